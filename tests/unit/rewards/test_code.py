import pytest

from tasks.config.reward import RewardParams
from tasks.config.rules import CodeRule
from tasks.core.errors import DataError
from tasks.core.rows import Prompt
from tasks.rewards.code import CodeReward, extract_program, function_under_test, select_tests, split_tests
from tasks.rewards.composition import build_reward
from tasks.rewards.rules.base import ScoresWithMetrics

needs_bubblewrap = pytest.mark.usefixtures("sandboxed")

PROMPT = 'def add_3(x):\n    """Return x plus 3."""\n'
TESTS = "assert add_3(1) == 4\nassert add_3(-3) == 0"


@pytest.mark.parametrize(
    ("prompt", "tests", "name"),
    [
        (PROMPT, TESTS, "add_3"),
        ("def helper(x):\n    return x\n\ndef main(x):\n", "", "main"),
        ("Write a program.", "# entry_point: area\nassert area(2) == 4", "area"),
        (PROMPT, "#entry_point:other\n", "other"),
        ("async def go(x):\n    def inner(y): pass\n", "", "go"),
    ],
)
def test_the_function_under_test(prompt: str, tests: str, name: str) -> None:
    assert function_under_test(prompt, tests) == name


def test_a_prompt_without_a_function_needs_its_name() -> None:
    problem = r"which function is under test\? The prompt 'Write it\.' .*`# entry_point: NAME"
    with pytest.raises(DataError, match=problem):
        function_under_test("Write it.", "assert f(1)")


@pytest.mark.parametrize(
    ("kind", "response", "program"),
    [
        ("fenced", "Here:\n```python\ndef f(): pass\n```\nDone.", "def f(): pass\n"),
        ("fenced", "```\nx = 1\n```", "x = 1\n"),
        ("fenced", "```python\ndef f(): pass\n```\nUse it:\n```python\nf()\n```", "def f(): pass\n"),
        ("fenced", "```python\nold = 1\ndef f(): pass\n```\nor\n```py\ndef f(): return 2\n```", "def f(): return 2\n"),
        ("fenced", "First:\n```bash\npip install foo\n```\nThen:\n```python\ndef f(): pass\n```\n", "def f(): pass\n"),
        ("fenced", "Example:\n```text\nf(1) -> 1\n```\n```\ndef f(): pass\n```\nDone.", "def f(): pass\n"),
        ("fenced", "```Python3 \r\ndef f(): pass\r\n```\r\nDone.", "def f(): pass\r\n"),
        ("fenced", "```python\ns = '```no end'\n```", "s = '```no end'\n"),
        ("whole", "def f(): pass", "def f(): pass"), ("whole", " \n", None), ("completion", "", None),
        ("completion", "    return 1", "def f():\n    return 1"), ("fenced", "def f(): pass", None),
        ("fenced", "```python\ndef f(): pass", None), ("fenced", "```bash\nls\n```", None),
    ],
)  # fmt: skip
def test_what_of_a_response_is_the_program(kind: str, response: str, program: str | None) -> None:
    assert extract_program(CodeRule(program=kind), "def f():\n", response, "f") == program  # type: ignore[arg-type]


@needs_bubblewrap
def test_right_programs_earn_1_and_ways_to_fail_are_counted() -> None:
    reward = CodeReward(CodeRule(program="completion", workers=2), {PROMPT: TESTS})
    assert isinstance(reward, ScoresWithMetrics)
    bodies = ["    return x + 3", "    return x - 3", "    return y", "", "    return print", "    return 'x' * 10**7"]
    values, metrics = reward.score_with_metrics([PROMPT] * 6, bodies)
    assert values.tolist() == [1, 0, 0, 0, 0, 0]
    assert {name.removeprefix("failures/"): column.tolist() for name, column in metrics.items()} == {
        "failed": [0, 1, 0, 0, 0, 0], "error": [0, 0, 1, 0, 0, 0], "timeout": [0] * 6, "memory": [0] * 6,
        "output_limit": [0, 0, 0, 0, 0, 1], "refused": [0, 0, 0, 1, 1, 0], "weak_tests": [0] * 6,
    }  # fmt: skip


def test_each_assert_of_the_function_is_a_test_of_its_own_beside_all_other_statements() -> None:
    assert split_tests("x = 1\nassert f(x) == 2\nfor y in (3, 4):\n    assert f(y)\nassert f(5)", "f") == [
        "x = 1\nassert f(x) == 2\nfor y in (3, 4):\n    assert f(y)",
        "x = 1\nfor y in (3, 4):\n    assert f(y)\nassert f(5)",
    ]
    checked = "def check(it):\n    assert it(1)\n    assert True, 'as HumanEval writes'\n    assert it(2)"
    assert split_tests(checked, "f") == [
        f"def check(it):\n    {tests}"
        for tests in (
            "assert it(1)\n    assert True, 'as HumanEval writes'",
            "assert True, 'as HumanEval writes'\n    assert it(2)",
        )
    ]
    for whole in ("# one\nassert f(1)", "```\nassert f(1)\nassert f(2)\n```"):
        assert split_tests(whole, "f") == [whole]


@needs_bubblewrap
def test_by_shares_a_program_earns_what_it_passes_and_so_does_a_constant() -> None:
    tests = "assert add_3(1) == 4\nassert add_3(2) == 5\nassert add_3(-3) == 0\nassert add_3(0) == 3"
    bodies = ["    return x + 3", "    return 4", "    return x + 3 if x else 1 / 0", "", "    return -4"]
    expected = {"share": [1, 0.25, 0.75, 0, 0], "all": [1, 0, 0, 0, 0]}
    for credit, shares in expected.items():
        reward = CodeReward(CodeRule(program="completion", credit=credit), {PROMPT: tests})  # type: ignore[arg-type]
        values, metrics = reward.score_with_metrics([PROMPT] * 5, bodies)
        assert values.tolist() == shares
        assert metrics["weak_tests"].tolist() == [0] * 5
    assert metrics["failures/error"].tolist() == [0, 0, 1, 0, 0]


@needs_bubblewrap
@pytest.mark.parametrize("credit", ["all", "share"])
def test_tests_that_cannot_judge_are_refused_and_a_case_that_is_easy_is_not_weak(credit: str) -> None:
    options, prompt = CodeRule(program="completion", credit=credit), "def first(xs):\n"  # type: ignore[arg-type]
    tests = "assert first([1]) == 1\nassert first([]) is None"
    reward = CodeReward(options, {prompt: tests})
    values, metrics = reward.score_with_metrics([prompt], ["    return xs[0] if xs else None"])
    assert (values.item(), metrics["weak_tests"].item()) == (1, 0)
    with pytest.raises(DataError, match="first"):
        CodeReward(options, {prompt: "```\nassert first([1]) == 1\nassert first([2]) == 2\n```"})


@needs_bubblewrap
def test_tests_take_helpers_from_the_prompt_and_not_from_the_response() -> None:
    prompt = "def poly(c, x):\n    return c[0] + c[1] * x\n\ndef root(c):\n"
    reward = CodeReward(CodeRule(program="completion"), {prompt: "assert abs(poly([-6, 2], root([-6, 2]))) < 1e-9"})
    responses = ["    return -c[0] / c[1]", "    return 0\n\ndef poly(c, x):\n    return 0"]
    assert reward.score_with_metrics([prompt] * 2, responses)[0].tolist() == [1, 0]


@needs_bubblewrap
def test_a_program_that_knows_the_training_tests_fails_the_held_out_ones() -> None:
    answers = {PROMPT: "assert add_3(1) == 4\n# held out\nassert add_3(-3) == 0"}
    responses = ["    return x + 3", "    return 4", "    return 0"]
    training, heldout = (CodeReward(CodeRule(program="completion", held_out=held), answers) for held in (False, True))
    assert training.score_with_metrics([PROMPT] * 3, responses)[0].tolist() == [1, 1, 0]
    assert heldout.score_with_metrics([PROMPT] * 3, responses)[0].tolist() == [1, 0, 1]


def test_rows_without_held_out_tests_have_one_set() -> None:
    assert select_tests(CodeRule(held_out=True), TESTS) == select_tests(CodeRule(), TESTS) == TESTS


@needs_bubblewrap
def test_a_prompt_without_tests_is_an_error() -> None:
    reward = CodeReward(CodeRule(), {PROMPT: TESTS})
    with pytest.raises(DataError, match=r"the rule 'code': no tests are known for the prompt 'other'.*`answer`"):
        reward.score_with_metrics(["other"], ["x"])


@needs_bubblewrap
def test_weak_tests_are_named_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    other = PROMPT.replace("add_3", "half")
    reward = CodeReward(CodeRule(program="completion"), {PROMPT: TESTS, other: "assert not abs(half(4) - 2) > 1e-9"})
    warning = capsys.readouterr().err
    assert "warning: the tests of 1 of 2 prompts pass where every call gives None, NaN" in warning
    assert "  half (NaN): 'def half(x):" in warning
    _, metrics = reward.score_with_metrics([PROMPT, other, other], ["    return 0"] * 3)
    assert metrics["weak_tests"].tolist() == [0, 1, 1]


@needs_bubblewrap
def test_tests_that_cannot_judge_are_an_error_before_training() -> None:
    with pytest.raises(DataError, match="the tests of add_3 cannot judge any program: they never call add_3"):
        CodeReward(CodeRule(), {PROMPT: "def test(): assert add_3(1) == 4"})


@needs_bubblewrap
def test_the_composed_reward_reports_how_programs_failed() -> None:
    rows = [Prompt(id="1", prompt=PROMPT, answer=TESTS)]
    params = RewardParams(weights={"code": 2.0}, rules={"code": {"program": "completion"}})
    reward = build_reward(params, rows, None)([PROMPT] * 2, ["    return 3 + x", "    return"])
    assert reward.total.tolist() == [2, 0]
    assert reward.metrics["failures/failed"].tolist() == [0, 1]
