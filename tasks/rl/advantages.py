"""Advantages: generalised advantage estimation, and the leave-one-out baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.rl.masking import check_left_aligned, zero_masked

__all__ = ["gae", "leave_one_out"]


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, each [B, T], 0 where masked.

        δ_t = r_t + γ · V_{t+1} − V_t        V after the last token that counts is 0: the episode is over
        A_t = δ_t + γλ · A_{t+1} = Σ_l (γλ)^l · δ_{t+l}
        returns = A + V

    λ = 1 gives Σ_l γ^l r_{t+l} − V_t (no bias, much variance), λ = 0 gives δ_t. The advantages are not whitened: do
    that afterwards, or the returns are those of another problem.

    Source: Schulman et al. 2016 (arXiv 1506.02438), equations 16 to 18; 2017 (arXiv 1707.06347), equations 11 and 12.

    Args:
        rewards: [B, T] per token.
        values: [B, T] V of the state *before* token t, from the rollout's value function.
        response_mask: [B, T] each row begins with a token that counts. Rewards and values elsewhere are ignored; where
            tokens that do not count stand between two that do, t + 1 is the next that counts.
        gamma: discount γ of rewards over tokens, in (0, 1].
        lam: λ, in [0, 1].

    Raises:
        ValueError: a row does not begin with a token that counts, or the shapes do not fit.
    """
    check_left_aligned(response_mask)
    rewards, values = zero_masked(rewards, response_mask), zero_masked(values, response_mask)
    advantage = next_value = torch.zeros_like(values[:, 0])
    reversed_advantages = []
    columns = (reversed(tensor.unbind(1)) for tensor in (rewards, values, response_mask))
    for reward, value, counts in zip(*columns, strict=True):
        delta = reward + gamma * next_value - value
        # What does not count is passed over: nothing is bootstrapped from it, and nothing decays across it.
        advantage = torch.where(counts, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(counts, value, next_value)
        reversed_advantages.append(advantage)
    advantages = zero_masked(torch.stack(reversed_advantages[::-1], dim=1), response_mask)
    return advantages, advantages + values


def leave_one_out(returns: Tensor, group: int) -> Tensor:
    """A_i = R_i − mean of R over the other responses to the same prompt, [B].

    The others' mean does not depend on the response itself, so it is a baseline without bias, and needs no value
    function.

    Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; for language models as RLOO, Ahmadian
    et al. 2024 (arXiv 2402.14740), section 3.2.

    Args:
        returns: [B] of whole responses, the KL penalty included; row b·group + g is sample g of prompt b.
        group: responses per prompt, at least 2.

    Raises:
        ValueError: the group is smaller than 2, or does not divide B.
    """
    if group < 2 or len(returns) % group:
        raise ValueError(f"need groups of at least 2 that divide the {len(returns)} returns, got {group}")
    grouped = returns.reshape(-1, group)
    others = (grouped.sum(1, keepdim=True) - grouped) / (group - 1)
    return (grouped - others).reshape(-1)
