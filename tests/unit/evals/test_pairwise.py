"""Questions, verdicts and what they add up to, by hand."""

from collections.abc import Callable, Sequence

import pytest

from tasks.evals import pairwise
from tasks.evals.compare import ScoredResponse, Table, compare_policies
from tasks.evals.pairwise import Reply, add_judge_metrics, judge_pairs, reliability_warnings
from tests.support.chat_server import longer, shown

Make = Callable[..., ScoredResponse]


class Judge:
    """Answers by a rule, and remembers what it was asked."""

    def __init__(self, rule: Callable[[str], str]) -> None:
        self.judge_id = {"kind": "rule", "model": "m", "base_url": ""}
        self.rule, self.asked = rule, list[str]()

    def judge(self, questions: Sequence[str]) -> list[Reply]:
        self.asked += questions
        return [Reply(text=self.rule(text), model="m", tokens=7) for text in questions]


@pytest.fixture
def records(judged: Make) -> list[ScoredResponse]:
    """Four prompts. Against SFT: PPO is longer, shorter, the same text, as long; GRPO writes as PPO where it counts."""
    texts = {
        "sft": (" xx", " xxxx", " same", " ab"),
        "ppo": (" yyy", " yyy", " same ", " cd"),
        "grpo": (" yyy", " xxxxx", " xxxxx", " xxxxx"),
    }
    return [
        judged(policy, prompt, response=response)
        for policy, responses in texts.items()
        for prompt, response in zip("abcd", responses, strict=True)
    ]


def _table(records: list[ScoredResponse], rule: Callable[[str], str], prompts: int = 4) -> Table:
    judgements = judge_pairs(records, Judge(rule), rubric="Longer?", prompts=prompts)
    return add_judge_metrics(compare_policies(records, samples=200, seed=0), judgements, samples=200, seed=0)


def test_each_pair_is_asked_in_both_orders_and_equal_responses_are_not(records: list[ScoredResponse]) -> None:
    judge = Judge(longer)
    judgements = judge_pairs(records, judge, rubric="Longer?", prompts=4)
    assert [shown(text) for text in judge.asked] == [
        ("yyy", "xx"), ("xx", "yyy"), ("yyy", "xxxx"), ("xxxx", "yyy"), ("cd", "ab"), ("ab", "cd"),
        # GRPO; of prompt a it wrote what PPO wrote, so that is known already
        ("xxxxx", "xxxx"), ("xxxx", "xxxxx"), ("xxxxx", "same"), ("same", "xxxxx"), ("xxxxx", "ab"), ("ab", "xxxxx"),
    ]  # fmt: skip
    assert len(judgements) == 16
    first = judgements[0]
    assert (first.id, first.answer, first.verdict) == ("ppo/a/policy first", "A", "A")
    assert (first.model, first.tokens, first.judge) == ("m", 7, judge.judge_id)
    same = next(judgement for judgement in judgements if judgement.id == "ppo/c/reference first")
    assert (same.answer, same.verdict, same.tokens) == (None, "tie", 0)


def test_the_question_hides_which_policy_is_which(records: list[ScoredResponse]) -> None:
    judge = Judge(longer)
    judge_pairs(records, judge, rubric="Longer?", prompts=4)
    one, other = judge.asked[:2]
    assert one.replace("yyy", "?").replace("xx", "?") == other.replace("yyy", "?").replace("xx", "?")
    for text in judge.asked:
        assert not {"ppo", "grpo", "sft", "policy", "reference"} & set(text.lower().replace("_", " ").split())
        assert "Longer?" in text
        assert "<beginning>\nprompt " in text
    assert "{a}" in pairwise.format_question("{r}", "{p}", "{a}", "{b}"), "braces are shown as they are"


def longer_first(text: str) -> str:
    """Where the longer text is second, this judge sees no difference."""
    return "A" if longer(text) == "A" else "tie"


@pytest.mark.parametrize(
    ("rule", "policy", "win_rate", "ties", "inconsistent", "first", "unclear"),
    [
        # PPO: longer, shorter, equal, tied: (1 + 0 + ½ + ½) / 4. Its letters: A B B A, so half of them the first.
        (longer, "ppo", 0.5, 0.5, 0.0, 0.5, 0.0),
        (longer, "grpo", 1.0, 0.0, 0.0, 0.5, 0.0),
        # A judge that always names the same letter shows nothing.
        (lambda _: "A", "grpo", 0.5, 1.0, 1.0, 1.0, 0.0),
        (lambda _: "B", "grpo", 0.5, 1.0, 1.0, 0.0, 0.0),
        # A win and a tie contradict each other.
        (longer_first, "grpo", 0.5, 1.0, 1.0, 1.0, 0.0),
        # What is unclear is a tie. Of PPO's eight judgements the two of the equal pair are not asked.
        (lambda _: "Both are fine.", "ppo", 0.5, 1.0, 0.0, 0.5, 0.75),
    ],
)
def test_metrics_by_hand(
    records: list[ScoredResponse], rule: Callable[[str], str], policy: str, win_rate: float, ties: float,
    inconsistent: float, first: float, unclear: float,
) -> None:  # fmt: skip
    row = _table(records, rule)[policy]
    expected = {
        "judge_n": 4, "win_rate_judge": win_rate, "judge_ties": ties, "judge_inconsistent": inconsistent,
        "judge_first": first, "judge_unclear": unclear,
    }  # fmt: skip
    assert {key: row[key] for key in expected} == expected
    low, high = row["win_rate_judge_low"], row["win_rate_judge_high"]
    assert low < win_rate < high if 0.0 < ties < 1.0 else low == win_rate == high


def test_only_the_first_prompts_are_judged(records: list[ScoredResponse]) -> None:
    row = _table(records, longer, prompts=1)["ppo"]
    assert (row["judge_n"], row["win_rate_judge"], row["judge_ties"]) == (1, 1.0, 0.0)


def test_the_reference_and_a_run_without_a_judge_have_no_keys_of_it(records: list[ScoredResponse]) -> None:
    plain = compare_policies(records, samples=200, seed=0)
    assert add_judge_metrics(plain, [], samples=200, seed=0) == plain
    judged = _table(records, longer)
    assert judged["sft"] == plain["sft"]
    assert {key: judged["ppo"][key] for key in plain["ppo"]} == plain["ppo"]


def test_doubts_name_the_policy_and_how_bad_it_is(records: list[ScoredResponse]) -> None:
    table = _table(records, lambda text: "A" if "yyy" in text else longer(text))
    assert (table["ppo"]["judge_inconsistent"], table["grpo"]["judge_inconsistent"]) == (0.5, 0.25)
    assert reliability_warnings(table) == []
    warnings = reliability_warnings(_table(records, lambda _: "A"))
    unclear = reliability_warnings(_table(records, lambda _: "Hm"))
    assert "chose the first in 100%" in warnings[0]
    for share, policy, warning, line in zip(("75%", "100%"), ("ppo", "grpo"), warnings, unclear, strict=True):
        assert warning.startswith(f"the judge contradicts itself on {share} of {policy}'s pairs when the ")
        assert f"{share} were unclear" in line


@pytest.mark.parametrize(
    ("answer", "meant"),
    [
        ("A", "A"), ("b", "B"), (" A.\n", "A"), ("**B**", "B"), ("[[A]]", "A"), ("(B)", "B"), ("Response A", "A"),
        ("The better response is B.", "B"), ("Answer: A", "A"), ("A\nBecause it is kinder than B.", "A"),
        ("B. It likes the film.", "B"), ("A is better", "A"), ("A: 0.5312", "A"), ("response_B", "B"), ("tie", "tie"),
        ("A tie.", "tie"), ("It is a tie", "tie"), ("Tie: both are dull", "tie"),
        ("", "unclear"), ("A touching film", "unclear"), ("A or B", "unclear"), ("A, B", "unclear"), ("AB", "unclear"),
        ("C", "unclear"), ("Both", "unclear"), ("I think that A is better", "unclear"), ("Better not", "unclear"),
        ("untied", "unclear"), ("tied up", "unclear"), ("1", "unclear"),
    ],
)  # fmt: skip
def test_verdicts(answer: str, meant: str) -> None:
    assert pairwise.parse_verdict(answer) == meant
