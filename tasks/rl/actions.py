"""Action levels: one action is a token, a turn of a conversation, or the whole response.

A turn is a run of unmasked tokens: the environment's tokens between two turns of the policy are masked.
Actions are numbered from the left, so with turns, where A = T, they fill the first columns.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tasks.rl.masking import masked_sum, zero_masked

__all__ = ["Action", "action_mask", "action_values", "to_actions", "turn_counts"]

Action = Literal["token", "turn", "response"]


def to_actions(per_token: Tensor, response_mask: Tensor, action: Action) -> Tensor:
    """Log-probabilities or rewards [B, T] of tokens as those of actions [B, A]: A = T, or 1 for whole responses.

    The probability of a turn or a response is the product of its tokens' probabilities, and its reward the sum of
    theirs.
    """
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
    """The sum of each turn's values where `mask`: [B, T], that of turn k in column k, 0 after the last turn."""
    turns = _turn_starts(response_mask).cumsum(1) - 1
    masked_values = zero_masked(values, mask)
    return torch.zeros_like(masked_values).scatter_add(1, turns, masked_values)
