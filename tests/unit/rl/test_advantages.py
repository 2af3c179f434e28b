"""Rewards, actions and advantages by hand; GAE also against its definition as a double sum."""

import math

import pytest
import torch
from torch import Tensor

from tasks.rl.advantages import (
    action_mask,
    action_values,
    apply_missing_eos_penalty,
    discount_by_turns,
    gae,
    group_advantages,
    leave_one_out,
    to_actions,
    token_rewards,
    turn_counts,
)

NAN, INF = math.nan, math.inf

# -- GAE ---------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("rewards", "values", "gamma", "lam", "expected"),
    [
        # λ = 1: the discounted rewards to go, whatever the values: 1 + 0.5·2 + 0.25·4 = 3, 2 + 0.5·4 = 4, 4.
        ([[1.0, 2.0, 4.0]], [[13.0, -7.0, 0.25]], 0.5, 1.0, [[3.0, 4.0, 4.0]]),
        # A perfect value function leaves no advantage.
        ([[0.0, 0.0, 5.0]], [[5.0, 5.0, 5.0]], 1.0, 0.95, [[5.0, 5.0, 5.0]]),
        # One token: A = r − V, whatever γ and λ.
        ([[3.0], [1.0]], [[1.0], [5.0]], 0.9, 0.9, [[3.0], [1.0]]),
    ],
)
def test_returns_by_hand(rewards: list, values: list, gamma: float, lam: float, expected: list) -> None:
    reward, value = torch.tensor(rewards), torch.tensor(values)
    advantages, returns = gae(reward, value, torch.ones_like(reward, dtype=torch.bool), gamma=gamma, lam=lam)
    assert returns.tolist() == expected
    assert torch.equal(advantages, returns - value)


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
    with pytest.raises(ValueError, match="right-padded"):
        token_rewards(torch.zeros(1), torch.zeros(1, 2), torch.tensor(mask), kl_coef=0.1)


def test_values_with_one_position_too_many_are_refused() -> None:
    with pytest.raises(ValueError, match="of the values' shape"):
        gae(torch.zeros(1, 2), torch.zeros(1, 3), torch.ones(1, 2, dtype=torch.bool), gamma=1.0, lam=0.95)


# -- rewards per token -------------------------------------------------------------------------------------------------

MASK = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
KL = torch.tensor([[0.2, -0.4, 0.6], [1.0, 2.0, NAN], [4.0, INF, NAN]], dtype=torch.float64)
SCORES = torch.tensor([10.0, 20.0, -30.0], dtype=torch.float64)


def test_the_score_stands_on_the_last_token_that_counts() -> None:
    # β = 0.5. Row 0: −0.1, 0.2, −0.3 + 10. Row 1: −0.5, −1 + 20, padding. Row 2: −2 − 30, padding, padding.
    rewards = token_rewards(SCORES, KL, MASK, kl_coef=0.5)
    assert rewards.flatten().tolist() == pytest.approx([-0.1, 0.2, 9.7, -0.5, 19.0, 0, -32.0, 0, 0], abs=1e-15)
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
    # γ = 0.5: 8, 8/2, −8/4; without discount they stay bit for bit.
    scores = discount_by_turns(torch.tensor([8.0, 8.0, -8.0]), torch.tensor([1, 2, 3]), 0.5)
    assert scores.tolist() == [8.0, 4.0, -2.0]
    scores = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(discount_by_turns(scores, torch.arange(1, 51), 1.0), scores)


@pytest.mark.parametrize("shape", [(3, 1), (2,), (1,)])
def test_scores_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"scores must be \[3\], one a response"):
        token_rewards(torch.zeros(shape), torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool), kl_coef=0.1)


def test_only_responses_without_an_end_token_are_penalised() -> None:
    scores = apply_missing_eos_penalty(torch.tensor([1.0, 2.0, -3.0]), torch.tensor([True, False, False]), 0.5)
    assert scores.tolist() == [1.0, 1.5, -3.5]


# -- tokens, turns and responses as actions ----------------------------------------------------------------------------

TWO_ROWS = torch.tensor([[True, True, False], [True, True, True]])
VALUES = torch.tensor([[1.0, 2.0, 100.0], [3.0, 4.0, 5.0]])


def test_tokens_stay_as_they_are():
    assert to_actions(VALUES, TWO_ROWS, "token") is VALUES
    assert action_values(VALUES, TWO_ROWS, "token") is VALUES
    assert action_mask(TWO_ROWS, "token") is TWO_ROWS


def test_a_response_is_the_sum_of_its_tokens_and_its_state_is_the_prompt():
    assert to_actions(VALUES, TWO_ROWS, "response").tolist() == [[3.0], [12.0]]
    assert action_values(VALUES, TWO_ROWS, "response").tolist() == [[1.0], [3.0]]
    assert action_mask(TWO_ROWS, "response").tolist() == [[True], [True]]


# Row 0: turns of tokens (0, 1) and (3); row 1: one turn of one token, then padding; row 2: turns (0), (2), (4).
TURNS = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0], [1, 0, 1, 0, 1]]).bool()
TOKEN_VALUES = torch.where(TURNS, torch.arange(1.0, 16.0).reshape(3, 5), NAN)


def test_a_turn_is_the_sum_of_its_tokens_in_the_column_of_its_number_and_its_state_that_of_its_first_token():
    assert to_actions(TOKEN_VALUES, TURNS, "turn").tolist() == [[3, 4, 0, 0, 0], [6, 0, 0, 0, 0], [11, 13, 15, 0, 0]]
    assert turn_counts(TURNS).tolist() == [2, 1, 3]
    assert action_mask(TURNS, "turn").long().tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]

    assert action_values(TOKEN_VALUES, TURNS, "turn").tolist() == [[1, 4, 0, 0, 0], [6, 0, 0, 0, 0], [11, 13, 15, 0, 0]]


def test_the_gradient_of_a_turn_reaches_its_own_tokens_and_its_first_state_alone():
    values = torch.ones(3, 5, requires_grad=True)
    (to_actions(values, TURNS, "turn") * torch.tensor([2.0, 3.0, 5.0, 7.0, 7.0])).sum().backward()
    assert values.grad.tolist() == [[2, 2, 0, 3, 0], [2, 0, 0, 0, 0], [2, 0, 3, 0, 5]]
    values.grad = None
    action_values(values, TURNS, "turn").sum().backward()
    assert values.grad.tolist() == [[1, 0, 0, 1, 0], [1, 0, 0, 0, 0], [1, 0, 1, 0, 1]]


def test_a_single_response_is_one_turn():
    assert to_actions(VALUES, TWO_ROWS, "turn")[:, :1].tolist() == to_actions(VALUES, TWO_ROWS, "response").tolist()
    assert turn_counts(TWO_ROWS).tolist() == [1, 1]


def test_leave_one_out_by_hand():
    """Group (1, 2, 6): the others' means are 4, 3.5, 1.5. Group (5, 5, 5): nothing is better than the others."""
    gains = leave_one_out(torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), 3)
    assert gains.tolist() == [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]
    assert leave_one_out(torch.tensor([1.0, 4.0]), 2).tolist() == [-3.0, 3.0]


def test_group_advantages_by_hand():
    # 1, 2, 6: mean 3, squares 4 + 1 + 9 over 2, deviation √7. Equal scores have no advantage.
    scores = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    scale = 7**0.5 + 1e-4
    expected = [-2 / scale, -1 / scale, 3 / scale, 0, 0, 0]
    assert group_advantages(scores, 3).tolist() == pytest.approx(expected, rel=1e-6)
    # 0 and 2e-4: deviation √2 · 1e-4, so ±1e-4 / (2.414e-4).
    assert group_advantages(torch.tensor([0.0, 2e-4]), 2).tolist() == pytest.approx([-0.41421, 0.41421], rel=1e-4)


@pytest.mark.parametrize("group", [0, 1, 4])
@pytest.mark.parametrize("advantages", [leave_one_out, group_advantages])
def test_groups_that_do_not_fit_are_refused(advantages, group):
    with pytest.raises(ValueError, match=f"groups of at least 2 that divide the 6 responses, got {group}"):
        advantages(torch.zeros(6), group)
