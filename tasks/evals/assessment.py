"""How well scores of single texts match what people said of them: correlation, error, parting of two classes."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["area_under_curve", "classification_metrics", "correlation", "rank_correlation", "rating_metrics"]


def rating_metrics(scores: Tensor, ratings: Tensor) -> dict[str, float]:
    """Of scores [N] that estimate mean ratings [N]: correlation, and the error in points."""
    return {
        "heldout_texts": len(ratings),
        "heldout_correlation": correlation(scores, ratings),
        "heldout_mean_absolute_error": (scores - ratings).abs().mean().item(),
    }


def classification_metrics(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Of log-odds [N] that a text is of the good class, and whether it is [N]; probability ½ decides."""
    return {
        "heldout_texts": len(labels),
        "heldout_good_share": labels.float().mean().item(),
        "heldout_accuracy": ((scores > 0) == labels.bool()).float().mean().item(),
        "heldout_auc": area_under_curve(scores, labels),
    }


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's."""
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's: Pearson's of the ranks, equal values sharing the mean of theirs."""
    return correlation(_ranks(x), _ranks(y))


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """How often a good text scores above another one, ties counting half; NaN where all are of one class.

    By the rank sum of the good ones: (Σ ranks − n₁(n₁ + 1)/2) / (n₁·n₀) (Mann & Whitney 1947).
    """
    ranks, positive = _ranks(scores), labels.bool()
    count = int(positive.sum())
    pairs = count * (len(positive) - count)
    return ((ranks[positive].sum() - count * (count + 1) / 2) / pairs).item() if pairs else float("nan")


def _ranks(values: Tensor) -> Tensor:
    from scipy.stats import rankdata  # which takes a moment

    return torch.from_numpy(rankdata(values.double().numpy()))
