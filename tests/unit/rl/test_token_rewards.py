"""Rewards per token by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tasks.rl.advantages import apply_missing_eos_penalty, discount_by_turns, token_rewards

NAN, INF = math.nan, math.inf

MASK = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
KL = torch.tensor([[0.2, -0.4, 0.6], [1.0, 2.0, NAN], [4.0, INF, NAN]], dtype=torch.float64)
SCORES = torch.tensor([10.0, 20.0, -30.0], dtype=torch.float64)


def test_the_score_stands_on_the_last_token_that_counts() -> None:
    # β = 0.5. Row 0: −0.1, 0.2, −0.3 + 10. Row 1: −0.5, −1 + 20, padding. Row 2: −2 − 30, padding, padding.
    rewards = token_rewards(SCORES, KL, MASK, kl_coef=0.5)
    assert rewards.flatten().tolist() == pytest.approx([-0.1, 0.2, 9.7, -0.5, 19.0, 0, -32.0, 0, 0], abs=1e-15)


def test_the_reward_of_a_response_is_its_score_less_the_kl_penalty() -> None:
    # Ziegler et al. 2019, equation 2: R = score − β · Σ k1. Row 0: 10 − 2·0.4, row 1: 20 − 2·3, row 2: −30 − 2·4.
    rewards = token_rewards(SCORES, KL, MASK, kl_coef=2.0)
    assert rewards.sum(1).tolist() == pytest.approx([9.2, 14.0, -38.0], abs=1e-12)


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_without_divergence_the_reward_is_the_score(kl_coef: float) -> None:
    rewards = token_rewards(SCORES, torch.zeros_like(KL), MASK, kl_coef=kl_coef)
    assert rewards.tolist() == [[0.0, 0.0, 10.0], [0.0, 20.0, 0.0], [-30.0, 0.0, 0.0]]


def test_in_a_conversation_the_score_stands_on_the_last_turns_last_token() -> None:
    # β = 0.5; the second token is the environment's, the last is padding: −0.5·2 on the first, 10 − 0.5·4 on the last.
    mask = torch.tensor([[True, False, True, False]])
    rewards = token_rewards(torch.tensor([10.0]), torch.tensor([[2.0, NAN, 4.0, INF]]), mask, kl_coef=0.5)
    assert rewards.tolist() == [[-1.0, 0.0, 8.0, 0.0]]


def test_a_score_is_discounted_for_every_turn_after_the_first() -> None:
    # γ = 0.5: 8, 8/2, −8/4.
    scores = discount_by_turns(torch.tensor([8.0, 8.0, -8.0]), torch.tensor([1, 2, 3]), 0.5)
    assert scores.tolist() == [8.0, 4.0, -2.0]


def test_without_discount_scores_stay_bit_for_bit() -> None:
    scores = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(discount_by_turns(scores, torch.arange(1, 51), 1.0), scores)


@pytest.mark.parametrize("second", [[False, False, False], [False, True, True]])
def test_a_mask_that_has_no_first_token_is_refused(second: list[bool]) -> None:
    mask = torch.tensor([[True, True, True], second, [True, False, False]])
    with pytest.raises(ValueError, match="response_mask"):
        token_rewards(SCORES, KL, mask, kl_coef=0.1)


@pytest.mark.parametrize("shape", [(3, 1), (2,), (1,)])
def test_scores_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"scores must be \[3\], one a response"):
        token_rewards(torch.zeros(shape), torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool), kl_coef=0.1)


def test_only_responses_without_an_end_token_are_penalised() -> None:
    scores = apply_missing_eos_penalty(torch.tensor([1.0, 2.0, -3.0]), torch.tensor([True, False, False]), 0.5)
    assert scores.tolist() == [1.0, 1.5, -3.5]
