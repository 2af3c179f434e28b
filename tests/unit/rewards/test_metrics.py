"""Correlation, ranks and the area under the curve, by hand and by independent implementations."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from tasks.rewards.metrics import (
    area_under_curve,
    classification_metrics,
    correlation,
    rank_correlation,
    rating_metrics,
)

SCORES = torch.tensor([2.0, -1.0, 0.5, 0.5, 3.0])
RATINGS = torch.tensor([1.0, -2.0, 0.5, 1.5, 2.0])
GOOD = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])


def test_figures_of_ratings_by_hand():
    """Errors 1, 1, 0, 1, 1."""
    found = rating_metrics(SCORES, RATINGS)
    assert found["heldout_texts"] == 5
    assert found["heldout_mean_absolute_error"] == pytest.approx(0.8)
    assert correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])) == pytest.approx(1.0)
    assert rank_correlation(SCORES, RATINGS) == pytest.approx(spearmanr(SCORES, RATINGS).statistic)


def test_figures_of_classes_by_hand():
    """Good: 2, 0.5, 3; others: −1, 0.5. Of the six comparisons five are right and one is a tie: 5.5/6."""
    assert area_under_curve(SCORES, GOOD) == pytest.approx(5.5 / 6) == roc_auc_score(GOOD, SCORES)
    found = classification_metrics(SCORES, GOOD)
    assert found["heldout_accuracy"] == pytest.approx(4 / 5), "0.5 is taken for good, and one of the two is not"
    assert found["heldout_good_share"] == pytest.approx(3 / 5)
    assert math.isnan(area_under_curve(SCORES, torch.ones(5)))
