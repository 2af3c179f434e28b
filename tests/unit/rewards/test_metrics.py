"""Metrics of scores against ratings, labels and pairs, worked by hand."""

import json
import math
from contextlib import nullcontext

import pytest
import torch

from tasks.core.errors import TrainingError
from tasks.rewards.metrics import (
    accuracy_by_margin,
    area_under_curve,
    calibration_table,
    check_above_chance,
    classification_metrics,
    correlation,
    margin_bucket,
    rank_correlation,
    rating_metrics,
)
from tasks.rewards.objectives import check_accuracy
from tasks.rewards.training import TrainingData
from tests.support.tiny_stages import run_reward_model, write_inputs

SCORES = torch.tensor([2.0, -1.0, 0.5, 0.5, 3.0])
RATINGS = torch.tensor([1.0, -2.0, 0.5, 1.5, 2.0])
GOOD = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])


def test_metrics_of_ratings_by_hand():
    """Errors 1, 1, 0, 1, 1."""
    found = rating_metrics(SCORES, RATINGS)
    assert found["heldout_texts"] == 5
    assert found["heldout_mean_absolute_error"] == pytest.approx(0.8)
    assert correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])) == pytest.approx(1.0)


def test_correlation_of_ranks_by_hand():
    """Ranks (4, 1, 2½, 2½, 5) and (3, 1, 2, 4, 5): less their mean 3, Σxy = 8, Σx² = 9½, Σy² = 10."""
    assert rank_correlation(SCORES, RATINGS) == pytest.approx(8 / 95**0.5)


@pytest.mark.parametrize("metric", [correlation, rank_correlation])
@pytest.mark.parametrize("column", [torch.ones(5), torch.tensor([1.0])])
def test_what_does_not_vary_has_no_correlation(metric, column):
    assert math.isnan(metric(column, RATINGS[: len(column)]))
    assert math.isnan(metric(RATINGS[: len(column)], column))


def test_metrics_of_classes_by_hand():
    """Good: 2, 0.5, 3; others: −1, 0.5. Of the six comparisons five are right and one is a tie: 5.5/6."""
    assert area_under_curve(SCORES, GOOD) == pytest.approx(5.5 / 6)
    found = classification_metrics(SCORES, GOOD)
    assert found["heldout_accuracy"] == pytest.approx(4 / 5), "0.5 is taken for good, and one of the two is not"
    assert found["heldout_good_share"] == pytest.approx(3 / 5)
    assert math.isnan(area_under_curve(SCORES, torch.ones(5)))


@pytest.mark.parametrize(
    ("margin", "bucket"), [(0.0, "0-0.5"), (-0.49, "0-0.5"), (0.5, "0.5-1"), (1.0, "1-2"), (-2.5, "2-3"), (7.0, "3+")]
)
def test_a_lower_edge_belongs_to_its_bucket(margin, bucket):
    assert margin_bucket(margin) == bucket


def test_accuracy_counts_positive_gaps_in_each_bucket():
    gaps = torch.tensor([1.0, -1.0, 2.0, 3.0, 0.0])
    margins = torch.tensor([1.5, 1.2, 3.5, float("nan"), 0.1])
    rows = {row["bucket"]: row for row in accuracy_by_margin(gaps, margins, {"1-2": 0.8})}
    assert rows["1-2"] == {"bucket": "1-2", "pairs": 2, "accuracy": 0.5, "ceiling": 0.8}
    assert rows["3+"]["accuracy"] == 1.0
    assert rows["0-0.5"]["accuracy"] == 0.0, "a gap of 0 orders nothing, so it is no agreement"
    assert rows["2-3"] == {"bucket": "2-3", "pairs": 0, "accuracy": "", "ceiling": ""}
    assert sum(row["pairs"] for row in rows.values()) == 4, "an unknown margin is in no bucket"


def test_expected_calibration_error_by_hand():
    """Stated 0.75 four times and 0.95 twice; people agreed 3 of 4 and 1 of 2: 4/6·0 + 2/6·|0.95 − 0.5| = 0.15."""
    low, high = math.log(0.75 / 0.25), math.log(0.95 / 0.05)
    gaps = torch.tensor([low, low, low, -low, high, -high])
    table, error = calibration_table(gaps)
    assert error == pytest.approx(0.15, abs=1e-6)
    rows = [(round(row["predicted"], 6), row["observed"], row["count"]) for row in table]
    assert rows == [(0.75, 0.75, 4), (0.95, 0.5, 2)]


def differences(right: int, ties: int, wrong: int) -> torch.Tensor:
    return torch.tensor([1.0] * right + [0.0] * ties + [-1.0] * wrong)


@pytest.mark.parametrize(
    ("right", "ties", "wrong", "stops"),
    [
        (0, 226, 0, True),  # the score depends on the prompt alone
        (0, 4, 0, True),  # 0.4⁴ = 0.026
        (0, 3, 0, False),  # 0.4³ = 0.064: too few to rule 0.6 out
        (113, 0, 113, True),
        (9, 0, 9, False),  # P(X ≤ 9 | 18, 0.6) = 0.26
        (8, 0, 0, False),
        (1100, 0, 900, False),  # 0.55 is below 0.6, but above chance: p = 4e-6
    ],
)
def test_accuracy_no_better_than_chance_stops(right, ties, wrong, stops):
    stop = pytest.raises(TrainingError, match=f"right on {right} of {right + ties + wrong} held-out pairs")
    with stop if stops else nullcontext():
        check_above_chance(differences(right, ties, wrong), 0.6)


def test_too_few_pairs_are_a_warning(caplog, capsys):
    check_above_chance(differences(0, 3, 0), 0.6)
    (line,) = caplog.messages
    assert line.startswith("reward_model: the reward model is right on 0 of 3 held-out pairs, no better than chance")
    assert capsys.readouterr().err == ""


def test_a_score_of_the_prompt_alone_is_named_and_the_setting_switches_it_off(caplog):
    with pytest.raises(TrainingError, match=r"on 50 both responses get the same score.*reward_model\.min_accuracy 0"):
        check_above_chance(torch.zeros(50), 0.6)
    check_above_chance(torch.zeros(50), 0.0)
    assert not caplog.messages


def test_rated_texts_are_compared_two_by_two_and_equal_targets_say_nothing():
    """Texts 1 and 2, 3 and 4, …; the last of an odd number is left over. Scores that follow the targets pass."""
    targets = [1.0, 2.0, 5.0, 5.0] * 15 + [3.0]
    data = TrainingData(targets={"test": targets})
    check_accuracy(data, torch.tensor(targets)[:, None], 0.6)
    with pytest.raises(TrainingError, match="right on 0 of 15 held-out pairs"):
        check_accuracy(data, -torch.tensor(targets)[:, None], 0.6)


def test_the_stage_stops_and_its_metrics_say_why(tmp_path):
    """Two epochs on 20 pairs of random letters teach nothing that 20 others would show."""
    write_inputs(tmp_path)
    with pytest.raises(TrainingError, match=r"right on \d+ of 20 held-out pairs.*no better than chance"):
        run_reward_model(tmp_path, tmp_path / "out", min_accuracy=0.9)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["accuracy"] < 0.7
