"""The gradients of both losses, of log-probabilities and of entropies against finite differences, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tasks.rl.losses import (
    entropy_from_logits,
    kl_loss,
    logprobs_from_logits,
    policy_loss,
    value_loss,
)

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

    fraction = policy_loss(logprobs, old, gains, MASK, clip_range=0.2, token_count=17).clip_fraction.item()
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

    fraction = value_loss(values, old, returns, MASK, value_clip_range=0.2, token_count=17).clip_fraction.item()
    assert 0.1 < fraction < 0.9, "the example must have clipped and unclipped tokens"
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
