"""One failure is counted and told once; a rule that fails on most of a batch is a bug."""

from __future__ import annotations

import math

import pytest

from tasks.config.reward import RewardParams
from tasks.core.errors import DataError, TrainingError
from tasks.core.rows import Prompt
from tasks.rewards.composition import CompositeReward, build_reward
from tasks.rewards.rules.base import FaultTolerantRule


def inverse(prompt: str, response: str) -> float:
    return 1 / int(response)


def test_a_failure_earns_the_floor_is_counted_and_is_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    rule = FaultTolerantRule("inverse", inverse, floor=-1.0)
    values, measures = rule.score_with_metrics(["p", "q", "r"], ["4", "0", "many"])
    assert values.tolist() == [0.25, -1.0, -1.0]
    assert {name: noticed.tolist() for name, noticed in measures.items()} == {"failures/inverse": [0.0, 1.0, 1.0]}
    message = capsys.readouterr().err
    assert "component 'inverse' failed on prompt 'q', response '0': ZeroDivisionError: division by zero" in message
    rule.score_with_metrics(["q"], ["0"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_a_failure(bad: float) -> None:
    values, measures = FaultTolerantRule("odd", lambda prompt, response: bad, floor=0.5).score_with_metrics(
        ["p"], ["r"]
    )
    assert values.tolist() == [0.5]
    assert measures["failures/odd"].tolist() == [1.0]


@pytest.mark.parametrize(("failing", "of", "stops"), [(4, 8, False), (5, 8, True), (8, 8, True), (7, 7, False)])
def test_most_of_a_batch_of_eight_is_no_accident(failing: int, of: int, stops: bool) -> None:
    responses = ["0"] * failing + ["1"] * (of - failing)
    rule = FaultTolerantRule("inverse", inverse, floor=0.0)
    if stops:
        with pytest.raises(TrainingError, match=rf"'inverse' fails on {failing} of {of} responses.*ZeroDivisionError"):
            rule.score_with_metrics(["p"] * of, responses)
    else:
        assert rule.score_with_metrics(["p"] * of, responses)[1]["failures/inverse"].sum() == failing


def test_failures_reach_the_reward_as_a_measure() -> None:
    outcome = CompositeReward({"inverse": FaultTolerantRule("inverse", inverse, 0.0)}, {"inverse": 2.0})(
        ["p", "p"], ["2", "0"]
    )
    assert outcome.total.tolist() == [1.0, 0.0]
    assert outcome.metrics["failures/inverse"].tolist() == [0.0, 1.0]


def test_a_missing_answer_is_no_accident_of_a_sample() -> None:
    reward = build_reward(
        RewardParams(weights={"contains_facts": 1.0}), [Prompt(id="a", prompt="Who?", answer="Ada")], None
    )
    with pytest.raises(DataError, match=r"reward\.weights\.facts: no right answer is known for the prompt 'Where\?'"):
        reward(["Where?"], ["Here"])


def test_each_rule_has_its_own_floor() -> None:
    rules = RewardParams(weights={"repetition": 1.0, "length": 1.0, "vader": 1.0}).rules
    assert {name: rule.floor for name, rule in rules.items()} == {"repetition": -1.0, "length": 0.0, "vader": -1.0}
