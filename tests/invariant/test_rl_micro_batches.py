"""However an optimiser step is split into micro-batches, its gradient and its metrics are those of the whole."""

from __future__ import annotations

import functools
import operator

import pytest
import torch
from torch import Tensor

from tasks.rl.losses import logprobs_from_logits, policy_loss, value_loss

B, T, V, D = 6, 5, 7, 4
MASK = torch.arange(T) < torch.tensor([5, 1, 3, 2, 5, 4])[:, None]


def step(splits: list[list[int]]) -> tuple[dict[str, float], Tensor]:
    """Metrics, and the gradient of one weight matrix that all tokens share, with one backward pass per split."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    states, weight = draw(B, T, D), draw(D, V + 1).requires_grad_()
    tokens = torch.randint(0, V, (B, T), generator=generator)
    moved = states @ (weight.detach() + 0.1 * draw(D, V + 1))
    old, old_values = logprobs_from_logits(moved[..., :V], tokens, 1.0), moved[..., V]
    gains, returns = draw(B, T), draw(B, T)
    count = int(MASK.sum())
    actors, critics = [], []
    for rows in splits:
        out = states[rows] @ weight
        actor = policy_loss(
            logprobs_from_logits(out[..., :V], tokens[rows], 1.0),
            old[rows],
            gains[rows],
            MASK[rows],
            clip_range=0.2,
            token_count=count,
        )
        critic = value_loss(
            out[..., V], old_values[rows], returns[rows], MASK[rows], value_clip_range=0.2, token_count=count
        )
        (actor.loss + 0.1 * critic.loss).backward()
        actors.append(actor)
        critics.append(critic)
    assert weight.grad is not None
    metrics = functools.reduce(operator.add, actors).metrics() | functools.reduce(operator.add, critics).metrics()
    return metrics, weight.grad


@pytest.mark.parametrize(
    "splits",
    [
        [[0, 1, 2], [3, 4, 5]],
        [[0], [1], [2], [3], [4], [5]],
        [[5, 1], [0, 2, 3, 4]],  # unequal, and in another order
        [[1], [0, 2, 3, 4, 5]],  # one token against nineteen
    ],
)
def test_splits_change_nothing(splits: list[list[int]]) -> None:
    metrics, gradient = step([list(range(B))])
    assert 0 < metrics["clip_fraction"] < 1, "the example must have clipped and unclipped tokens"
    assert 0 < metrics["value_clip_fraction"] < 1, "the example must have clipped and unclipped values"
    split_metrics, split_gradient = step(splits)
    torch.testing.assert_close(split_gradient, gradient, rtol=1e-12, atol=1e-14)
    assert split_metrics == pytest.approx(metrics, rel=1e-12)
