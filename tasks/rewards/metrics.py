"""Metrics of scores against human preferences, ratings and labels: accuracy, correlation, AUC, calibration."""

import logging
import math
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tasks.core.errors import TrainingError

__all__ = [
    "CLEAR_MARGIN", "MARGIN_BUCKETS", "accuracy_by_margin", "calibration_table", "check_above_chance",
    "classification_metrics", "correlation", "fraction_true", "margin_bucket", "pair_metrics", "rank_correlation",
    "rating_metrics",
]  # fmt: skip

logger = logging.getLogger(__name__)

MARGIN_EDGES = (0.0, 0.5, 1.0, 2.0, 3.0)
MARGIN_BUCKETS = ("0-0.5", "0.5-1", "1-2", "2-3", "3+")
CLEAR_MARGIN = 1.0
"""Buckets of the absolute difference of mean ratings, in points of the rating scale."""

SIGNIFICANCE = 0.05
"""Level of the one-sided tests of a reward model's accuracy."""

# scipy.stats and sklearn.metrics take about a second to import, so they are imported where they are used.


def rating_metrics(scores: Tensor, ratings: Tensor) -> dict[str, float]:
    """Correlation and mean absolute error, in points, of scores [N] that estimate mean ratings [N]."""
    return {
        "heldout_texts": len(ratings),
        "heldout_correlation": correlation(scores, ratings),
        "heldout_mean_absolute_error": (scores - ratings).abs().mean().item(),
    }


def classification_metrics(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy at probability ½ and AUC of log-odds [N] against binary labels [N]."""
    return {
        "heldout_texts": len(labels),
        "heldout_good_share": labels.float().mean().item(),
        "heldout_accuracy": ((scores > 0) == labels.bool()).float().mean().item(),
        "heldout_auc": area_under_curve(scores, labels),
    }


def pair_metrics(score_differences: Tensor, margins: Tensor) -> dict[str, float]:
    """Accuracy on preference pairs, of all and of those with a clear margin; 0 without pairs.

    Score differences [N] are chosen − rejected; margins [N] are those of mean ratings in points, NaN where unknown.
    """
    clear = margins.abs() >= CLEAR_MARGIN
    return {
        "heldout_pairs": len(margins),
        "accuracy": fraction_true(score_differences > 0),
        "accuracy_margin_1": fraction_true(score_differences[clear] > 0),
        "pairs_margin_1": int(clear.sum()),
    }


def check_above_chance(score_differences: Tensor, min_accuracy: float) -> None:
    """Check that a reward model is of use: its accuracy on held-out pairs [N], one of equal scores being wrong.

    Both tests are binomial and one-sided, at 5 %. Where the pairs are too few to tell, a warning says so.

    Raises:
        TrainingError: the pairs do not show that accuracy is above ½, and show that it is below `min_accuracy`.
    """
    from scipy.stats import binom

    count, right = len(score_differences), int((score_differences > 0).sum())
    p_value = float(binom.sf(right - 1, count, 0.5))
    if p_value <= SIGNIFICANCE or not min_accuracy:
        return
    found = f"the reward model is right on {right} of {count} held-out pairs, no better than chance (p = {p_value:.2g})"
    if binom.cdf(right, count, min_accuracy) > SIGNIFICANCE:
        logger.warning("reward_model: %s; raise preferences.heldout_pairs to know better", found)
        return
    if ties := int((score_differences == 0).sum()):
        found += f"; on {ties} both responses get the same score"
    raise TrainingError(
        f"{found}: a policy that maximises it learns noise. Give it more rows or more reward_model.epochs; "
        "reward_model.min_accuracy 0 goes on with it"
    )


def fraction_true(values: Tensor) -> float:
    """Fraction of the values [N] that are true; 0 of none."""
    return values.float().mean().item() if values.numel() else 0.0


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson correlation; NaN where one of the two does not vary."""
    from scipy.stats import pearsonr

    return float(pearsonr(x.double(), y.double()).statistic) if _vary(x, y) else math.nan


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman rank correlation; ties share their mean rank; NaN where one of the two does not vary."""
    from scipy.stats import spearmanr

    return float(spearmanr(x, y).statistic) if _vary(x, y) else math.nan


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """Probability that a positive scores above a negative, ties counting ½; NaN where all labels are equal."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores)) if _vary(labels) else math.nan


def _vary(*columns: Tensor) -> bool:
    """Whether all vary; the libraries warn or raise where one does not."""
    return all(len(column) > 1 and bool((column != column[0]).any()) for column in columns)


def margin_bucket(margin: float) -> str:
    """Name of the bucket of an absolute margin; the lower edge belongs to the bucket."""
    return MARGIN_BUCKETS[bisect_right(MARGIN_EDGES, abs(margin)) - 1]


def accuracy_by_margin(
    score_differences: Tensor, margins: Tensor, ceiling: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row per bucket: number of pairs, accuracy of the model, and agreement among raters; none without pairs.

    Score differences and margins as in `pair_metrics`; a pair of unknown margin is in no bucket. `ceiling`: bucket →
    agreement of single raters with the others.
    """
    names = [None if math.isnan(margin) else margin_bucket(margin) for margin in margins.tolist()]
    rows = []
    for bucket in MARGIN_BUCKETS if names else ():
        hits = score_differences[torch.tensor([name == bucket for name in names])] > 0
        accuracy = fraction_true(hits) if len(hits) else ""
        rows.append({"bucket": bucket, "pairs": len(hits), "accuracy": accuracy, "ceiling": ceiling.get(bucket, "")})
    return rows


def calibration_table(score_differences: Tensor, bins: int = 10) -> tuple[list[dict[str, Any]], float]:
    """Predicted against observed probability, and the expected calibration error (Guo et al. 2017, equation 3).

    The prediction of a pair is max(σ(gap), σ(−gap)), and the observation is whether people agree. Bins are equally wide
    between ½ and 1, lower edge included (scikit-learn's calibration_curve includes the upper one and gives no counts).
    """
    from scipy.stats import binned_statistic

    predicted = torch.sigmoid(score_differences.abs().double())
    observed = (score_differences > 0).double()
    means, _, numbers = binned_statistic(predicted, [predicted, observed], "mean", bins, range=(0.5, 1))
    counts = torch.bincount(torch.from_numpy(numbers), minlength=bins + 2)[1 : bins + 1]
    rows = [
        {"predicted": float(stated), "observed": float(agreed), "count": int(count)}
        for stated, agreed, count in zip(*means, counts, strict=True)
        if count
    ]
    gaps = (row["count"] * abs(row["predicted"] - row["observed"]) for row in rows)
    return rows, sum(gaps) / len(score_differences)
