"""Metrics of scores against human ratings or labels of single texts: correlation, error, AUC."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["area_under_curve", "classification_metrics", "correlation", "rank_correlation", "rating_metrics"]


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
