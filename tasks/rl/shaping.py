"""Token rewards from response scores."""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.rl.masking import check_left_aligned, through_last_true, zero_masked

__all__ = ["discount_by_turns", "apply_missing_eos_penalty", "token_rewards"]


def token_rewards(scores: Tensor, kl_k1: Tensor, response_mask: Tensor, *, kl_coef: float) -> Tensor:
    """r_t = −β · k1_t + [t is the last token that counts] · score, [B, T], 0 where masked.

    Summed over t it is R(x, y) = r(x, y) − β · log(π(y|x) / ρ(y|x)) of Ziegler et al. 2019 (arXiv 1909.08593),
    equation 2. The score stands on the end token itself: on the padding after it (a known bug) it would be masked away.

    Args:
        scores: [B] one per response.
        kl_k1: [B, T] log π − log π_ref of each token.
        response_mask: [B, T] each row begins with a token that counts.
        kl_coef: β.

    Raises:
        ValueError: a row does not begin with a token that counts, or the shapes do not fit.
    """
    check_left_aligned(response_mask)
    if scores.shape != response_mask.shape[:1]:
        raise ValueError(f"scores must be [{response_mask.shape[0]}], one a response, got {list(scores.shape)}")
    counts_after = torch.nn.functional.pad(through_last_true(response_mask)[:, 1:], (0, 1))
    is_last = response_mask & ~counts_after
    return zero_masked(-kl_coef * kl_k1, response_mask) + zero_masked(scores.unsqueeze(1).expand_as(kl_k1), is_last)


def apply_missing_eos_penalty(scores: Tensor, has_eos: Tensor, penalty: float) -> Tensor:
    """Scores [B], less the penalty where `has_eos` [B] is false: the response was cut off before its end token.

    Source: the idea of Ziegler et al. 2019 and of Huang et al. 2024 (arXiv 2403.17031, "EOS trick"), who *replace* the
    score by −1. Subtracting keeps the order among cut responses, and means the same on every scale of scores that is
    normalised to σ = 1. Of scores that are discounted it is subtracted afterwards: a cut late in a conversation would
    else cost less.
    """
    return torch.where(has_eos, scores, scores - penalty)


def discount_by_turns(scores: Tensor, turns: Tensor, gamma: float) -> Tensor:
    """γ^(n − 1) · score, [B]: the score of turn n, discounted to the first turn.

    It is the return of the first turn, G_0 = Σ_k γ^k · r_k, where only the last of the n turns has a reward (Sutton and
    Barto 2018, equation 3.8); for learners that have one return for the whole conversation.
    """
    return scores * gamma ** (turns - 1)
