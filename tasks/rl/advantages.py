"""Rewards and advantages of actions: GAE, leave-one-out, and advantages within a prompt's responses."""

import math
from typing import Literal

import torch
from torch import Tensor

from tasks.rl.masking import check_left_aligned, masked_sum, through_last_true, zero_masked

__all__ = [
    "action_mask", "action_values", "apply_missing_eos_penalty", "discount_by_turns", "gae", "group_advantages",
    "groups_without_signal", "leave_one_out", "overlong_ramp", "to_actions", "token_rewards", "top_entropy_tokens",
    "turn_counts",
]  # fmt: skip

Action = Literal["token", "turn", "response"]
Scale = Literal["group", "batch", "none"]

STD_EPSILON = 1e-4


def to_actions(per_token: Tensor, response_mask: Tensor, action: Action) -> Tensor:
    """Sum the log-probabilities or rewards [B, T] of each action's tokens: [B, A], A = T, or 1 for whole responses."""
    if action == "token":
        return per_token
    if action == "turn":
        return _per_turn(per_token, response_mask, response_mask)
    return masked_sum(per_token, response_mask, dim=1).unsqueeze(1)


def action_values(values: Tensor, response_mask: Tensor, action: Action) -> Tensor:
    """Value of the state in which each action is taken: of each token, of each turn's first token, or of the prompt."""
    if action == "token":
        return values
    return _per_turn(values, _turn_starts(response_mask), response_mask) if action == "turn" else values[:, :1]


def action_mask(response_mask: Tensor, action: Action) -> Tensor:
    """Mask of the actions: [B, T] for tokens and turns, [B, 1] for whole responses."""
    if action == "token":
        return response_mask
    if action == "turn":
        positions = torch.arange(response_mask.shape[1], device=response_mask.device)
        return positions < turn_counts(response_mask).unsqueeze(1)
    return response_mask.any(1, keepdim=True)


def turn_counts(response_mask: Tensor) -> Tensor:
    """Number of turns of each row, [B]."""
    return _turn_starts(response_mask).sum(1)


def _turn_starts(response_mask: Tensor) -> Tensor:
    """True [B, T] at the first token of each turn."""
    counts_before = torch.nn.functional.pad(response_mask[:, :-1], (1, 0))
    return response_mask & ~counts_before


def _per_turn(values: Tensor, mask: Tensor, response_mask: Tensor) -> Tensor:
    """Sum of each turn's values where `mask`: [B, T], turn k in column k, 0 after the last turn."""
    turns = _turn_starts(response_mask).cumsum(1) - 1
    masked_values = zero_masked(values, mask)
    return torch.zeros_like(masked_values).scatter_add(1, turns, masked_values)


def token_rewards(scores: Tensor, kl_k1: Tensor, response_mask: Tensor, *, kl_coef: float) -> Tensor:
    """r_t = −β · k1_t + [t is the last token that counts] · score, [B, T], 0 where masked.

    Summed over t it is R(x, y) = r(x, y) − β · log(π(y|x) / ρ(y|x)) of Ziegler et al. 2019 (arXiv 1909.08593),
    equation 2. The score stands on the end token itself: on the padding after it (a known bug) it would be masked away.

    Args:
        scores: [B].
        kl_k1: [B, T] log π − log π_ref of each token.
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


def apply_missing_eos_penalty(scores: Tensor, has_eos: Tensor, penalty: float, ramp: Tensor | float = 0.0) -> Tensor:
    """Scores [B], less the penalty where `has_eos` [B] is false: the response was cut off before its end token.

    With an end token it costs the share `ramp` of the penalty, see `overlong_ramp`.

    Ziegler et al. 2019 and Huang et al. 2024 (arXiv 2403.17031, "EOS trick") *replace* the score by −1. Subtracting
    keeps the order among cut responses. It comes after discounting: a cut late in a conversation would else cost less.
    """
    return torch.where(has_eos, scores - penalty * ramp, scores - penalty)


def overlong_ramp(lengths: Tensor, *, longest: int, buffer: int) -> Tensor:
    """min(1, max(0, (|y| − (longest − buffer)) / buffer)), [B]: 0 up to the buffer, 1 at the longest.

    Source: Yu et al. 2025 (DAPO, arXiv 2503.14476), equation 13, with the sign turned.

    Args:
        lengths: [B] |y|, tokens of each response.
        longest: L_max.
        buffer: L_cache, 0 for none.
    """
    share = (lengths - (longest - buffer)) / buffer if buffer else torch.zeros(len(lengths), device=lengths.device)
    return share.clamp(0, 1)


def discount_by_turns(scores: Tensor, turns: Tensor, gamma: float) -> Tensor:
    """γ^(n − 1) · score, [B]: the score of turn n, discounted to the first turn.

    The return of the first turn, Σ_k γ^k · r_k, where only the last turn has a reward (Sutton and Barto 2018, eq. 3.8).
    """
    return scores * gamma ** (turns - 1)


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, each [B, T], 0 where masked.

        δ_t = r_t + γ · V_{t+1} − V_t        V after the last token that counts is 0: the episode is over
        A_t = δ_t + γλ · A_{t+1} = Σ_l (γλ)^l · δ_{t+l}
        returns = A + V

    The advantages are not whitened: do that afterwards, or the returns are those of another problem.

    Source: Schulman et al. 2016 (arXiv 1506.02438), equations 16 to 18; 2017 (arXiv 1707.06347), equations 11 and 12.

    Args:
        values: [B, T] V of the state *before* token t, from the rollout's value function.
        response_mask: [B, T]; where tokens that do not count stand between two that do, t + 1 is the next that counts.
        gamma: γ, in (0, 1].
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

    Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; for language models as RLOO, Ahmadian
    et al. 2024 (arXiv 2402.14740), section 3.2.

    Args:
        returns: [B] of whole responses, the KL penalty included; row b·group + g is sample g of prompt b.

    Raises:
        ValueError: the group is smaller than 2, or does not divide B.
    """
    grouped = _grouped(returns, group)
    others = (grouped.sum(1, keepdim=True) - grouped) / (group - 1)
    return (grouped - others).reshape(-1)


def group_advantages(scores: Tensor, group: int, scale: Scale = "group") -> Tensor:
    """A_i = (r_i − mean r) / (std + 1e-4), [B], with the mean over the prompt's responses.

    std is the unbiased standard deviation of the prompt's responses (`group`) or of all scores (`batch`); with `none`
    nothing is divided.

    Source: Shao et al. 2024 (arXiv 2402.03300), section 4.1.2; none: Liu et al. 2025 (arXiv 2503.20783), section 3.2;
    batch: Hu et al. 2025 (REINFORCE++ with baseline, arXiv 2501.03262). The 1e-4 is TRL's (`scale_rewards`). Rows and
    errors are those of `leave_one_out`.
    """
    grouped = _grouped(scores, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    if scale == "none":
        return centred.reshape(-1)
    deviation = grouped.std(1, keepdim=True) if scale == "group" else scores.std()
    return (centred / (deviation + STD_EPSILON)).reshape(-1)


def groups_without_signal(scores: Tensor, group: int) -> list[int]:
    """Positions of the prompts whose responses all have one score; rows and errors are those of `leave_one_out`."""
    grouped = _grouped(scores, group)
    return [int(position) for position in (grouped == grouped[:, :1]).all(1).nonzero()]


def top_entropy_tokens(entropies: Tensor, response_mask: Tensor, share: float) -> Tensor:
    """True [B, T] at the tokens whose entropy is at least the (1 − share) quantile of those that count.

    Source: Wang et al. 2025 (arXiv 2506.01939); the quantile as in TRL (`top_entropy_quantile`), but over
    the whole rollout, so that it does not depend on how that is split.
    """
    counted = entropies[response_mask]
    # The least at or above the quantile, whose place is rounded at 1e-9. torch.quantile refuses more than 2^24 numbers.
    place = math.ceil((len(counted) - 1) * (1 - share) - 1e-9)
    threshold = counted.kthvalue(place + 1).values
    return (entropies >= threshold) & response_mask


def _grouped(scores: Tensor, group: int) -> Tensor:
    """[B] → [prompts, group]."""
    if group < 2 or len(scores) % group:
        raise ValueError(f"need groups of at least 2 that divide the {len(scores)} responses, got {group}")
    return scores.reshape(-1, group)
