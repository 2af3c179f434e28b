"""Rewards that users write: found by name, called with sample and options, refused by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import tasks.rewards.custom
from tasks.config import rules
from tasks.config.reward import RewardParams
from tasks.config.rules import check_custom_rule
from tasks.core.errors import ConfigError
from tasks.core.rows import Prompt
from tasks.rewards.composition import build_reward

MODULE = """
import math
LIMIT = 3
def near(prompt: str, response: str, answer: str | None, scale: float, *, sign: int = 1) -> float:
    return sign * scale * (len(response) if answer is None else abs(len(response) - len(answer)))
def free(prompt, response, answer, **options):
    return float(options["base"])
def short(prompt, response):
    return 0.0
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of users' modules, known to params and importable, and nothing of it left behind."""
    (tmp_path / "mine.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "broken.py").write_text(
        "import no_such_package\ndef f(prompt, response, answer): ...", encoding="utf-8"
    )
    (tmp_path / "crooked.py").write_text("def f(:", encoding="utf-8")
    monkeypatch.setattr(rules, "CUSTOM_DIR", tmp_path)
    monkeypatch.setattr(tasks.rewards.custom, "__path__", [str(tmp_path)])
    for name in ("mine", "broken"):
        monkeypatch.delitem(sys.modules, f"tasks.rewards.custom.{name}", raising=False)
    return tmp_path


def test_the_example_scores_by_its_options() -> None:
    params = RewardParams(weights={"loud": 2.0}, rules={"loud": {"function": "example:shout", "at_most": 0.5}})
    outcome = build_reward(params, [], None)(["p"] * 3, ["AAaa", "AAAA", "12!"])
    assert outcome.components["loud"].tolist() == [0.5, 0.5, 0.0]
    assert outcome.total.tolist() == [1.0, 1.0, 0.0]


def test_a_function_gets_the_sample_its_answer_and_its_options(folder: Path) -> None:
    rules = {"near": {"function": "mine:near", "scale": 2.0, "sign": -1}, "free": {"function": "mine:free", "base": 7}}
    params = RewardParams(weights={"near": 1.0, "free": 1.0}, rules=rules)
    rows = [Prompt(id="a", prompt="Who?", answer="Ada"), Prompt(id="b", prompt="Hm")]
    outcome = build_reward(params, rows, None)(["Who?", "Hm"], ["A", "four"])
    assert outcome.components["near"].tolist() == [-4.0, -8.0]  # −2·|1 − 3|, −2·4
    assert outcome.components["free"].tolist() == [7.0, 7.0]


@pytest.mark.parametrize(
    ("function", "options", "problem"),
    [
        ("mien:near", {}, r"there is no tasks/rewards/custom/mien\.py; did you mean mine"),
        ("mine:nera", {"scale": 1}, r"mine\.py defines no 'nera'; did you mean near"),
        ("mine:LIMIT", {}, r"mine\.py defines no 'LIMIT'; there is: free, near, short"),
        ("mine:near", {}, r"'mine:near' needs the option 'scale'; add it beside `function`"),
        ("mine:near", {"scale": 1, "sing": 1}, r"takes no option 'sing'; did you mean sign"),
        ("mine:short", {}, r"must take \(prompt, response, answer, …\), it takes \('prompt', 'response'\)"),
        ("crooked:f", {}, r"crooked\.py:1 is no Python"),
    ],
)
def test_what_is_not_there_is_reported_before_anything_runs(
    function: str, options: dict[str, object], problem: str, folder: Path
) -> None:
    with pytest.raises(ValueError, match=problem):
        check_custom_rule(function, options)


def test_a_module_that_cannot_be_imported_is_named(folder: Path) -> None:
    params = RewardParams(weights={"b": 1.0}, rules={"b": {"function": "broken:f"}})
    with pytest.raises(ConfigError, match=r"'broken:f' cannot be imported: ModuleNotFoundError.*no_such_package"):
        build_reward(params, [], None)
