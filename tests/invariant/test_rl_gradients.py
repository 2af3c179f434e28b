"""Gradients of losses, log-probabilities and entropies against finite differences, in float64; and however an optimiser
step is split into micro-batches, its gradient and its metrics are those of the whole."""

import functools
import math
import operator

import pytest
import torch
from torch import Tensor

from tasks.rl.losses import entropy_from_logits, kl_loss, logprobs_from_logits, policy_loss, value_loss

MASK = torch.arange(6) < torch.tensor([6, 1, 4, 5])[:, None]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_junk(values: Tensor, junk: float) -> Tensor:
    return values.masked_fill(~MASK, junk)


def test_policy_loss() -> None:
    old, gains = with_junk(normal(4, 6, seed=1), math.nan), with_junk(normal(4, 6, seed=2), math.inf)
    logprobs = (old.nan_to_num() + 0.3 * normal(4, 6, seed=3)).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return policy_loss(x, old, gains, MASK, clip_range=0.2, token_count=17).loss

    fraction = policy_loss(logprobs, old, gains, MASK, clip_range=0.2, token_count=17).metrics()["clip_fraction"]
    assert 0.1 < fraction < 0.9, "the example must have clipped and unclipped tokens"
    assert torch.autograd.gradcheck(loss, (logprobs,), eps=1e-6, atol=1e-8, rtol=1e-6)


def test_weighted_policy_loss_and_kl_loss() -> None:
    old, gains = with_junk(normal(4, 6, seed=1), math.nan), with_junk(normal(4, 6, seed=2), math.inf)
    reference, weights = with_junk(normal(4, 6, seed=10), math.nan), with_junk(normal(4, 6, seed=11), math.nan)
    logprobs = (old.nan_to_num() + 0.3 * normal(4, 6, seed=3)).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        policy = policy_loss(x, old, gains, MASK, clip_range=0.2, weights=weights)
        return policy.loss + 0.3 * kl_loss(x, old, reference, MASK, weights=weights).loss

    assert torch.autograd.gradcheck(loss, (logprobs,), eps=1e-6, atol=1e-8, rtol=1e-6)


def test_value_loss() -> None:
    old, returns = with_junk(normal(4, 6, seed=4), -math.inf), with_junk(normal(4, 6, seed=5), math.nan)
    values = (old.nan_to_num(neginf=0.0) + 0.3 * normal(4, 6, seed=6)).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return value_loss(x, old, returns, MASK, value_clip_range=0.2, token_count=17).loss

    metrics = value_loss(values, old, returns, MASK, value_clip_range=0.2, token_count=17).metrics()
    assert 0.1 < metrics["value_clip_fraction"] < 0.9
    assert torch.autograd.gradcheck(loss, (values,), eps=1e-6, atol=1e-8, rtol=1e-6)


def test_logprobs() -> None:
    logits = (normal(2, 3, 5, seed=7) * 3).requires_grad_()
    tokens = torch.tensor([[0, 4, 2], [1, 1, 3]])
    for temperature in (1.0, 0.7):
        assert torch.autograd.gradcheck(
            lambda x, t=temperature: logprobs_from_logits(x, tokens, t), (logits,), eps=1e-6, atol=1e-8, rtol=1e-6
        )


def test_entropy() -> None:
    logits = (normal(2, 3, 5, seed=8) * 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: entropy_from_logits(x, 0.7), (logits,), eps=1e-6, atol=1e-8, rtol=1e-6)


def test_both_losses_down_to_the_logits() -> None:
    """The whole way from logits to the policy loss, with a clipped and a free token."""
    logits = normal(2, 3, 4, seed=9).requires_grad_()
    tokens = torch.tensor([[0, 1, 2], [3, 3, 3]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    old = logprobs_from_logits(logits.detach(), tokens, 0.7) - torch.tensor([[0.5, 0.05, 0], [-0.5, 0, 0]])
    gains = torch.tensor([[1.0, -2.0, math.nan], [1.5, math.inf, 0.0]], dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return policy_loss(logprobs_from_logits(x, tokens, 0.7), old, gains, mask, clip_range=0.2, token_count=3).loss

    assert torch.autograd.gradcheck(loss, (logits,), eps=1e-6, atol=1e-8, rtol=1e-6)


# -- micro-batches -----------------------------------------------------------------------------------------------------

B, T, V, D = 6, 5, 7, 4
STEP_MASK = torch.arange(T) < torch.tensor([5, 1, 3, 2, 5, 4])[:, None]


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
    count = int(STEP_MASK.sum())
    actors, critics = [], []
    for rows in splits:
        out, mask = states[rows] @ weight, STEP_MASK[rows]
        logprobs = logprobs_from_logits(out[..., :V], tokens[rows], 1.0)
        actor = policy_loss(logprobs, old[rows], gains[rows], mask, clip_range=0.2, token_count=count)
        clipping = {"value_clip_range": 0.2, "token_count": count}
        critic = value_loss(out[..., V], old_values[rows], returns[rows], mask, **clipping)
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
    assert 0 < metrics["value_clip_fraction"] < 1
    split_metrics, split_gradient = step(splits)
    torch.testing.assert_close(split_gradient, gradient, rtol=1e-12, atol=1e-14)
    assert split_metrics == pytest.approx(metrics, rel=1e-12)
