"""Accuracy by margin and calibration against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tasks.rewards.metrics import accuracy_by_margin, calibration_table, margin_bucket


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
    assert [(round(row["predicted"], 6), row["observed"], row["count"]) for row in table] == [
        (0.75, 0.75, 4),
        (0.95, 0.5, 2),
    ]
