"""Masked statistics over tokens.

`response_mask` [B, T] is true where a token counts, everywhere in this package. A masked value never matters, not even
NaN or infinity: it is replaced (`torch.where`), not multiplied by zero. A mask begins with a token that counts; what
does not count is padding after the last one that does, or, between two that do, the environment's text.
"""

import math

import torch
from torch import Tensor

__all__ = [
    "check_left_aligned", "explained_variance", "masked_mean", "masked_sum", "masked_var", "through_last_true",
    "whiten", "zero_masked",
]  # fmt: skip

WHITEN_EPSILON = 1e-8  # openai/lm-human-preferences, utils/core.py::whiten


def zero_masked(values: Tensor, response_mask: Tensor) -> Tensor:
    """The values [B, T] where the mask is true, 0 elsewhere; no gradient reaches the masked ones.

    Raises:
        ValueError: the shapes differ, so that one would be broadcast silently, or the mask is not boolean.
    """
    if values.shape != response_mask.shape or response_mask.dtype != torch.bool:
        raise ValueError(
            f"response_mask must be boolean and of the values' shape {tuple(values.shape)}, "
            f"got {response_mask.dtype} {tuple(response_mask.shape)}"
        )
    return torch.where(response_mask, values, values.new_zeros(()))


def check_left_aligned(response_mask: Tensor) -> None:
    """Raise ValueError for a mask [B, T] with a row that is empty or padded on the left."""
    if not response_mask[:, 0].all():
        rows = (~response_mask[:, 0]).nonzero().squeeze(1).tolist()
        raise ValueError(f"response_mask: no token counts at the start of rows {rows}; responses are right-padded")


def through_last_true(response_mask: Tensor) -> Tensor:
    """True [B, T] up to and including the last token that counts: wherever a token stands that is no padding."""
    return response_mask.flip(1).cumsum(1).flip(1) > 0


def masked_sum(values: Tensor, response_mask: Tensor, dim: int | None = None) -> Tensor:
    """Σ over the true positions of [B, T]: a scalar, or along one dimension. 0 where there is none."""
    kept = zero_masked(values, response_mask)
    # In two steps: how torch splits one over all of a large tensor depends on the number of threads.
    return kept.sum(1).sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, response_mask: Tensor) -> Tensor:
    """Mean over the true positions of [B, T], a scalar: each token weighs the same. NaN if there is none."""
    return masked_sum(values, response_mask) / response_mask.sum()


def masked_var(values: Tensor, response_mask: Tensor) -> Tensor:
    """Variance over the true positions of [B, T], a scalar: the biased one, mean((x − mean)²).

    Biased as in Ziegler et al.'s code (`tf.nn.moments` in openai/lm-human-preferences, utils/core.py), and because it
    is 0 and not NaN for a single token.
    """
    return masked_mean((values - masked_mean(values, response_mask)) ** 2, response_mask)


def whiten(values: Tensor, response_mask: Tensor) -> Tensor:
    """(x − mean) / √(var + 1e-8) at the true positions of [B, T], 0 elsewhere.

    Give the whole batch, not a micro-batch and not one rank's share, or the gradient depends on how it was split.

    Source: Ziegler et al. 2019, openai/lm-human-preferences, utils/core.py::whiten (ours always shifts the mean).
    """
    mean, var = masked_mean(values, response_mask), masked_var(values, response_mask)
    return zero_masked((values - mean) * torch.rsqrt(var + WHITEN_EPSILON), response_mask)


def explained_variance(values: Tensor, returns: Tensor, response_mask: Tensor) -> Tensor:
    """1 − Var(R − V) / Var(R) over the true positions of [B, T], a scalar.

    1 is a perfect value function, 0 as good as a constant, negative worse. Where all returns are equal, it is 0.
    """
    highest = torch.where(response_mask, returns, -math.inf).max()
    lowest = torch.where(response_mask, returns, math.inf).min()
    unexplained = masked_var(returns - values, response_mask) / masked_var(returns, response_mask)
    return torch.where(highest == lowest, torch.zeros_like(unexplained), 1 - unexplained)
