"""Metrics of scores against human ratings or labels of single texts: correlation, error, AUC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "MARGIN_BUCKETS",
    "accuracy_by_margin",
    "area_under_curve",
    "calibration_table",
    "classification_metrics",
    "correlation",
    "margin_bucket",
    "rank_correlation",
    "rating_metrics",
]


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


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson correlation."""
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman rank correlation: Pearson correlation of the ranks; ties share their mean rank."""
    return correlation(_ranks(x), _ranks(y))


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """Probability that a positive scores above a negative, ties counting ½; NaN where all labels are equal.

    From the rank sum of the positives: (Σ ranks − n₁(n₁ + 1)/2) / (n₁·n₀) (Mann & Whitney 1947).
    """
    ranks, positive = _ranks(scores), labels.bool()
    count = int(positive.sum())
    pairs = count * (len(positive) - count)
    return ((ranks[positive].sum() - count * (count + 1) / 2) / pairs).item() if pairs else float("nan")


def _ranks(values: Tensor) -> Tensor:
    from scipy.stats import rankdata  # slow to import

    return torch.from_numpy(rankdata(values.double().numpy()))


class _MarginBuckets(NamedTuple):
    """Buckets of the absolute difference of mean ratings, in points of the rating scale."""

    edges: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 3.0)
    clear_margin: float = 1.0

    def names(self) -> list[str]:
        pairs = zip(self.edges, self.edges[1:], strict=False)
        return [*(f"{low:g}-{high:g}" for low, high in pairs), f"{self.edges[-1]:g}+"]


MARGIN_BUCKETS = _MarginBuckets()


def margin_bucket(margin: float) -> str:
    """Name of the bucket of an absolute margin; the lower edge belongs to the bucket."""
    index = sum(abs(margin) >= edge for edge in MARGIN_BUCKETS.edges) - 1
    return MARGIN_BUCKETS.names()[index]


def accuracy_by_margin(
    score_differences: Tensor, margins: Tensor, ceiling: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row per bucket: number of pairs, accuracy of the model, and agreement among raters.

    Args:
        score_differences: [N] score of the chosen minus score of the rejected text.
        margins: [N] difference of mean ratings in points; NaN where unknown, and such pairs are in no bucket.
        ceiling: bucket → agreement of single raters with the others; missing buckets stay empty.
    """
    names = [None if torch.isnan(margin) else margin_bucket(float(margin)) for margin in margins]
    rows = []
    for bucket in MARGIN_BUCKETS.names():
        in_bucket = torch.tensor([name == bucket for name in names], dtype=torch.bool)
        count = int(in_bucket.sum())
        accuracy = (score_differences[in_bucket] > 0).float().mean().item() if count else ""
        rows.append({"bucket": bucket, "pairs": count, "accuracy": accuracy, "ceiling": ceiling.get(bucket, "")})
    return rows


def calibration_table(score_differences: Tensor, bins: int = 10) -> tuple[list[dict[str, Any]], float]:
    """Predicted against observed probability, and the expected calibration error (Guo et al. 2017, equation 3).

    Each pair is oriented so that the predicted probability is at least ½: it is
    max(σ(gap), σ(−gap)), and the observation is whether people agree. Bins are equally wide between ½ and 1.
    """
    stated = torch.sigmoid(score_differences.abs().double())
    agreed = (score_differences > 0).double()
    index = ((stated - 0.5) * 2 * bins).long().clamp(0, bins - 1)
    rows, error = [], 0.0
    for number in range(bins):
        in_bin = index == number
        count = int(in_bin.sum())
        if count:
            predicted, observed = stated[in_bin].mean().item(), agreed[in_bin].mean().item()
            rows.append({"predicted": predicted, "observed": observed, "count": count})
            error += count / len(score_differences) * abs(predicted - observed)
    return rows, error
