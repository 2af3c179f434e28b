"""What counts as one action: each token (an episode has many steps), or the whole response (a bandit)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from tasks.rl.masking import masked_sum

__all__ = ["Action", "action_mask", "state_values", "summed"]

Action = Literal["token", "response"]


def summed(per_token: Tensor, response_mask: Tensor, action: Action) -> Tensor:
    """Log-probabilities or rewards [B, T] of tokens as those of actions: [B, T] themselves, or their sum [B, 1].

    The probability of a response is the product of its tokens' probabilities, and its return the sum of their rewards.
    """
    return per_token if action == "token" else masked_sum(per_token, response_mask, dim=1).unsqueeze(1)


def state_values(values: Tensor, action: Action) -> Tensor:
    """V of the state in which each action is taken: [B, T] themselves, or that of the prompt [B, 1]."""
    return values if action == "token" else values[:, :1]


def action_mask(response_mask: Tensor, action: Action) -> Tensor:
    """Which actions count: [B, T] tokens, or every response [B, 1]."""
    return response_mask if action == "token" else response_mask.any(1, keepdim=True)
