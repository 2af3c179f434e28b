"""The parts of one's own that docs/extend.md shows are the shipped examples, and do what the page says."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from tasks.config.data import SourceParams
from tasks.config.evaluation import EvaluateParams
from tasks.config.params import Params
from tasks.config.reward import RewardParams
from tasks.config.training import EnvironmentParams, GenerationParams
from tasks.core.custom import forget_custom, load_custom
from tasks.core.errors import ConfigError, DataError
from tasks.core.paths import DISABLED_MARKER
from tasks.core.rows import Prompt
from tasks.data.sources import collect_source
from tasks.evals.scoring import load_gold_reward
from tasks.rewards.composition import build_reward
from tasks.rl.environments import Step
from tasks.rl.multi_turn import MultiTurnSampler, with_environment
from tasks.rl.rollout import LocalSampler
from tests.conftest import ROOT, SHIPPED_PARAMS, letter_tokenizer, tiny_model

PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))
BROKEN = {
    "fails": "def rows(id):\n    yield {'prompt': 'a'}\n    raise KeyError('b')\n",
    "unimportable": "import no_such_package\ndef rows(id): ...\nclass Chat: ...\n",
    "crooked": "def rows(:\n",
}
EVALUATE = {
    "prompts": 1,
    "batch_size": 1,
    "bootstrap_samples": 1,
    "report_samples": 1,
    "vader": False,
    "llm_judge": None,
}
GENERATION = GenerationParams(max_new_tokens=3, temperature=1.0)


@pytest.fixture(autouse=True)
def folder(root: Path) -> Iterator[Path]:
    """custom/ of an empty project, with what the page shows and what does not work."""
    for name, text in BLOCKS.items():
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(text)
        for broken, code in BROKEN.items():
            (root / name).with_stem(broken).write_text(code)
    forget_custom()
    yield root / "custom"
    forget_custom()


def source(kind: str, **more: Any) -> SourceParams:
    return SourceParams(kind=kind, **({"name": "faq", "row_type": "demonstrations", "id": "faq.txt"} | more))


def test_the_page_shows_the_shipped_example_of_each_kind() -> None:
    assert sorted(BLOCKS) == sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("custom/*/example.py"))
    assert len(BLOCKS) == 4
    for name, text in BLOCKS.items():
        assert text == (ROOT / name).read_text(encoding="utf-8")


def test_the_reader(root: Path) -> None:
    (root / "faq.txt").write_text("Who?\n= Ada.\n\nWhy not?\n= So.\n")
    found = collect_source(source("example:questions", id=str(root / "faq.txt"), options={"separator": "="}), 0)
    assert [row["row"] for row in found.rows] == [
        {"id": "faq-1", "prompt": "Who?", "response": "Ada."},
        {"id": "faq-2", "prompt": "Why not?", "response": "So."},
    ]
    assert found.origin["source"] == "example:questions of custom/readers"


def test_the_judge_and_the_reward(root: Path) -> None:
    (root / "gold_judge" / "adapter").mkdir(parents=True)
    (root / "gold_judge" / "adapter" / DISABLED_MARKER).touch()
    evaluate = EvaluateParams.model_validate(EVALUATE | {"gold_rule": {"function": "example:ends", "marks": "!"}})
    judge = load_gold_reward([], root, root / "gold_judge", evaluate.gold_rule)
    assert list(judge(["p"] * 3, ["Yes!", "Yes.", "Yes! "])) == [1.0, 0.0, 1.0]
    reward = RewardParams(weights={"loud": 2.0}, rules={"loud": {"function": "example:shout", "at_most": 0.5}})
    assert build_reward(reward, [], None)(["p"] * 2, ["AAaa", "aaaa"]).total.tolist() == [1.0, 0.0]


def test_a_judge_is_no_reward(folder: Path) -> None:
    """A judge in custom/rewards would train the policies again after every change."""
    (folder / "judges" / "mine.py").write_text(BLOCKS["custom/judges/example.py"])
    with pytest.raises(ValidationError, match=r"no custom/rewards/mine\.py"):
        RewardParams(weights={"a": 1.0}, rules={"a": {"function": "mine:ends"}})
    with pytest.raises(ValidationError, match=r"custom/judges/example\.py defines no 'shout'; there is: ends"):
        EvaluateParams.model_validate(EVALUATE | {"gold_rule": {"function": "example:shout"}})


def test_a_judge_may_have_the_name_of_a_reward(folder: Path) -> None:
    for kind, name in (("judges", "ends"), ("rewards", "shout")):
        text = BLOCKS[f"custom/{kind}/example.py"].replace(f"def {name}(", "def score(")
        (folder / kind / "mine.py").write_text(text)
    content = yaml.safe_load(SHIPPED_PARAMS.read_text(encoding="utf-8"))
    content["gold_judge"], content["reward"]["weights"]["mine"] = None, 1.0
    content["reward"]["rules"] = {"mine": {"function": "mine:score"}}
    content["evaluate"]["gold_rule"] = {"function": "mine:score"}
    assert Params.model_validate(content).evaluate.gold_rule is not None


def test_the_environment() -> None:
    params = EnvironmentParams(kind="example:HigherLower", max_turns=3, gamma=1.0)
    sampler = with_environment(LocalSampler(tiny_model(), letter_tokenizer(), GENERATION), params)
    assert isinstance(sampler, MultiTurnSampler)
    environment = sampler._environment()
    assert environment.reset(Prompt(id="a", prompt="User: 2 + 3?\nBot:", answer="5")) == "User: 2 + 3?\nBot:"
    answers = [environment.step(action) for action in (" four", " 4.", " 7", " 5")]
    assert answers == [
        Step("A number, please.", 0.0, done=False),
        Step("Too low.", 0.0, done=False),
        Step("Too high.", 0.0, done=False),
        Step("That is right.", 1.0, done=True),
    ]


def test_the_next_stage_of_a_process_sees_a_changed_file(folder: Path) -> None:
    file = folder / "rewards" / "mine.py"
    file.write_text("from custom.rewards.example import shout\ndef mine(prompt, response, answer): return 1.0\n")
    first = load_custom("rewards", "mine:mine")
    assert load_custom("rewards", "mine:shout")("p", "AAaa", None) == 0.5
    file.write_text("def mine(prompt, response, answer): return 2.0\n")
    assert load_custom("rewards", "mine:mine") is first, "within a stage a module is imported once"
    forget_custom()
    assert load_custom("rewards", "mine:mine")("p", "r", None) == 2.0


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("lokal", r"neither a kind nor module:name of custom/readers; did you mean local\?"),
        ("exampel:questions", r"there is no custom/readers/exampel\.py; did you mean example\?"),
        ("example:question", r"custom/readers/example\.py defines no 'question'; did you mean questions\?"),
        ("crooked:rows", r"custom/readers/crooked\.py:1 is no Python"),
    ],
)
def test_a_reader_that_is_not_there(kind: str, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        source(kind)


def test_an_environment_that_is_not_there() -> None:
    for kind, problem in (("servicebot", "did you mean service_bot"), ("example:Higher", "did you mean HigherLower")):
        with pytest.raises(ValidationError, match=problem):
            EnvironmentParams(kind=kind, max_turns=1, gamma=1.0)


def test_what_cannot_be_imported_or_fails() -> None:
    problem = r"'unimportable:\w+' cannot be imported: ModuleNotFoundError: .*; see custom/(readers|environments)/unimp"
    with pytest.raises(ConfigError, match=problem):
        collect_source(source("unimportable:rows"), 0)
    with pytest.raises(ConfigError, match=problem):
        load_custom("environments", "unimportable:Chat")
    with pytest.raises(DataError, match=r"source 'faq': fails:rows fails on 'faq\.txt': KeyError: 'b'"):
        collect_source(source("fails:rows"), 0)
    with pytest.raises(DataError, match=r"example:questions fails on .*: FileNotFoundError"):
        collect_source(source("example:questions"), 0)
    assert len(collect_source(source("fails:rows", limit=1, row_type="prompts"), 0).rows) == 1, "no more than the limit"
