"""How well scores of single texts match what people said of them: correlation, error, parting of two classes."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["area_under_curve", "class_figures", "correlation", "rank_correlation", "rating_figures"]


def rating_figures(scores: Tensor, ratings: Tensor) -> dict[str, float]:
    """Of scores [N] that estimate mean ratings [N]: correlation, and the error in points."""
    return {
        "heldout_texts": len(ratings),
        "heldout_correlation": correlation(scores, ratings),
        "heldout_mean_absolute_error": (scores - ratings).abs().mean().item(),
    }


def class_figures(scores: Tensor, good: Tensor) -> dict[str, float]:
    """Of log-odds [N] that a text is of the good class, and whether it is [N]; probability ½ decides."""
    return {
        "heldout_texts": len(good),
        "heldout_good_share": good.float().mean().item(),
        "heldout_accuracy": ((scores > 0) == good.bool()).float().mean().item(),
        "heldout_auc": area_under_curve(scores, good),
    }


def correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's."""
    return torch.corrcoef(torch.stack([one, other]))[0, 1].item()


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's: Pearson's of the ranks, equal values sharing the mean of theirs."""
    return correlation(_ranks(one), _ranks(other))


def area_under_curve(scores: Tensor, good: Tensor) -> float:
    """How often a good text scores above another one, ties counting half; NaN where all are of one class.

    By the rank sum of the good ones: (Σ ranks − n₁(n₁ + 1)/2) / (n₁·n₀) (Mann & Whitney 1947).
    """
    ranks, hits = _ranks(scores), good.bool()
    count = int(hits.merged_weight())
    pairs = count * (len(hits) - count)
    return ((ranks[hits].merged_weight() - count * (count + 1) / 2) / pairs).item() if pairs else float("nan")


def _ranks(values: Tensor) -> Tensor:
    from scipy.stats import rankdata  # which takes a moment

    return torch.from_numpy(rankdata(values.double().numpy()))
