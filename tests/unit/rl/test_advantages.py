"""Generalised advantage estimation by hand, and against its definition as a double sum."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tasks.rl.advantages import gae

NAN, INF = math.nan, math.inf


def test_three_tokens_by_hand() -> None:
    # γ = 0.5, λ = 0.5, so γλ = 0.25; r = 1, 2, 3 and V = 4, 6, 8:
    #   δ_2 = 3 + 0.5·0 − 8 = −5      A_2 = −5
    #   δ_1 = 2 + 0.5·8 − 6 = 0       A_1 = 0 + 0.25·(−5) = −1.25
    #   δ_0 = 1 + 0.5·6 − 4 = 0       A_0 = 0 + 0.25·(−1.25) = −0.3125
    # Row 1 ends after its first token: A = 1 − 4 = −3; what stands after it is never read.
    rewards = torch.tensor([[1.0, 2.0, 3.0], [1.0, NAN, INF]])
    values = torch.tensor([[4.0, 6.0, 8.0], [4.0, INF, NAN]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[-0.3125, -1.25, -5.0], [-3.0, 0.0, 0.0]]
    assert returns.tolist() == [[3.6875, 4.75, 3.0], [1.0, 0.0, 0.0]]


def by_definition(rewards: Tensor, values: Tensor, lengths: list[int], gamma: float, lam: float) -> Tensor:
    """A_t = Σ_l (γλ)^l · δ_{t+l}, as a sum over all later tokens, with δ from its own formula; O(T²)."""
    result = torch.zeros_like(rewards)
    for b, length in enumerate(lengths):
        for t in range(length):
            for later in range(t, length):
                after = values[b, later + 1] if later + 1 < length else 0.0
                delta = rewards[b, later] + gamma * after - values[b, later]
                result[b, t] += (gamma * lam) ** (later - t) * delta
    return result


@pytest.mark.parametrize("gamma", [1.0, 0.97, 0.5])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_agrees_with_the_definition(gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(7)
    lengths = [1, 2, 7, 12, 11]
    rewards, values = (torch.randn(5, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    expected = by_definition(rewards, values, lengths, gamma, lam)
    torch.testing.assert_close(advantages, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, torch.where(mask, expected + values, 0.0), rtol=1e-12, atol=1e-12)


def test_lambda_one_returns_the_discounted_rewards_to_go_whatever_the_values() -> None:
    # γ = 0.5: 1 + 0.5·2 + 0.25·4 = 3, 2 + 0.5·4 = 4, 4.
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    values = torch.tensor([[13.0, -7.0, 0.25]])
    _, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.5, lam=1.0)
    assert returns.tolist() == [[3.0, 4.0, 4.0]]


def test_a_perfect_value_function_leaves_no_advantage() -> None:
    # γ = 1, one reward of 5 at the end, V = 5 everywhere.
    rewards, values = torch.tensor([[0.0, 0.0, 5.0]]), torch.full((1, 3), 5.0)
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=0.95)
    assert advantages.tolist() == [[0.0, 0.0, 0.0]]
    assert returns.tolist() == [[5.0, 5.0, 5.0]]


def test_responses_of_one_token() -> None:
    # A = r − V, whatever γ and λ.
    advantages, returns = gae(
        torch.tensor([[3.0], [1.0]]),
        torch.tensor([[1.0], [5.0]]),
        torch.ones(2, 1, dtype=torch.bool),
        gamma=0.9,
        lam=0.9,
    )
    assert advantages.tolist() == [[2.0], [-4.0]]
    assert returns.tolist() == [[3.0], [1.0]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.5, 0.5), (0.9, 0.0)])
def test_what_an_environment_says_between_two_tokens_is_passed_over(gamma: float, lam: float) -> None:
    """The advantages of a conversation are those of its own tokens side by side."""
    mask = torch.tensor([[True, False, False, True, True, False, True, False]])
    own = mask[0].nonzero().squeeze(1)
    generator = torch.Generator().manual_seed(3)
    rewards, values = (torch.randn(1, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    junk = [torch.where(mask, tensor, NAN) for tensor in (rewards, values)]
    advantages, returns = gae(*junk, mask, gamma=gamma, lam=lam)
    expected = by_definition(rewards[:, own], values[:, own], [4], gamma, lam)
    torch.testing.assert_close(advantages[:, own], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns[:, own], expected + values[:, own], rtol=1e-12, atol=1e-12)
    assert advantages[~mask].eq(0).all()
    assert returns[~mask].eq(0).all()


def test_inputs_are_left_alone() -> None:
    rewards, values = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    gae(rewards, values, torch.tensor([[True, False]]), gamma=1.0, lam=0.95)
    assert rewards.tolist() == [[1.0, 2.0]]
    assert values.tolist() == [[3.0, 4.0]]


@pytest.mark.parametrize("mask", [[[False, True]], [[False, False]]])
def test_a_mask_that_is_not_right_padded_is_refused(mask: list[list[bool]]) -> None:
    with pytest.raises(ValueError, match="right-padded"):
        gae(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor(mask), gamma=1.0, lam=0.95)


def test_values_with_one_position_too_many_are_refused() -> None:
    with pytest.raises(ValueError, match="of the values' shape"):
        gae(torch.zeros(1, 2), torch.zeros(1, 3), torch.ones(1, 2, dtype=torch.bool), gamma=1.0, lam=0.95)
