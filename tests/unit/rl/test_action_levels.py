"""Tokens as actions, and the response as one."""

from __future__ import annotations

import pytest
import torch

from tasks.rl.advantages import (
    action_mask,
    action_values,
    group_standardised,
    leave_one_out,
    to_actions,
    turn_counts,
)

MASK = torch.tensor([[True, True, False], [True, True, True]])
VALUES = torch.tensor([[1.0, 2.0, 100.0], [3.0, 4.0, 5.0]])


def test_tokens_stay_as_they_are():
    assert to_actions(VALUES, MASK, "token") is VALUES
    assert action_values(VALUES, MASK, "token") is VALUES
    assert action_mask(MASK, "token") is MASK


def test_a_response_is_the_sum_of_its_tokens_and_its_state_is_the_prompt():
    assert to_actions(VALUES, MASK, "response").tolist() == [[3.0], [12.0]]
    assert action_values(VALUES, MASK, "response").tolist() == [[1.0], [3.0]]
    assert action_mask(MASK, "response").tolist() == [[True], [True]]


# Row 0: turns of tokens (0, 1) and (3); row 1: one turn of one token, then padding; row 2: turns (0), (2), (4).
TURNS = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0], [1, 0, 1, 0, 1]]).bool()
NAN = float("nan")
TOKEN_VALUES = torch.where(TURNS, torch.arange(1.0, 16.0).reshape(3, 5), NAN)


def test_a_turn_is_the_sum_of_its_tokens_and_stands_in_the_column_of_its_number():
    assert to_actions(TOKEN_VALUES, TURNS, "turn").tolist() == [[3, 4, 0, 0, 0], [6, 0, 0, 0, 0], [11, 13, 15, 0, 0]]
    assert turn_counts(TURNS).tolist() == [2, 1, 3]
    assert action_mask(TURNS, "turn").long().tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]


def test_the_state_of_a_turn_is_that_of_its_first_token():
    assert action_values(TOKEN_VALUES, TURNS, "turn").tolist() == [[1, 4, 0, 0, 0], [6, 0, 0, 0, 0], [11, 13, 15, 0, 0]]


def test_the_gradient_of_a_turn_reaches_its_own_tokens_and_its_first_state_alone():
    values = torch.ones(3, 5, requires_grad=True)
    (to_actions(values, TURNS, "turn") * torch.tensor([2.0, 3.0, 5.0, 7.0, 7.0])).sum().backward()
    assert values.grad.tolist() == [[2, 2, 0, 3, 0], [2, 0, 0, 0, 0], [2, 0, 3, 0, 5]]
    values.grad = None
    action_values(values, TURNS, "turn").sum().backward()
    assert values.grad.tolist() == [[1, 0, 0, 1, 0], [1, 0, 0, 0, 0], [1, 0, 1, 0, 1]]


def test_a_single_response_is_one_turn():
    assert to_actions(VALUES, MASK, "turn")[:, :1].tolist() == to_actions(VALUES, MASK, "response").tolist()
    assert turn_counts(MASK).tolist() == [1, 1]


def test_leave_one_out_by_hand():
    """Group (1, 2, 6): the others' means are 4, 3.5, 1.5. Group (5, 5, 5): nothing is better than the others."""
    gains = leave_one_out(torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), 3)
    assert gains.tolist() == [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]


def test_leave_one_out_of_two_is_their_difference():
    assert leave_one_out(torch.tensor([1.0, 4.0]), 2).tolist() == [-3.0, 3.0]


@pytest.mark.parametrize("group", [0, 1, 4])
def test_leave_one_out_refuses_groups_that_do_not_fit(group):
    with pytest.raises(ValueError, match=f"got {group}"):
        leave_one_out(torch.zeros(6), group)


def test_group_standardised_by_hand():
    # 1, 2, 6: mean 3, squares 4 + 1 + 9 over 2, deviation √7. Equal scores have no advantage.
    scores = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    scale = 7**0.5 + 1e-4
    expected = [-2 / scale, -1 / scale, 3 / scale, 0, 0, 0]
    assert group_standardised(scores, 3).tolist() == pytest.approx(expected, rel=1e-6)


def test_a_small_deviation_does_not_blow_up_the_advantages():
    # 0 and 2e-4: deviation √2 · 1e-4, so ±1e-4 / (2.414e-4).
    assert group_standardised(torch.tensor([0.0, 2e-4]), 2).tolist() == pytest.approx([-0.41421, 0.41421], rel=1e-4)


@pytest.mark.parametrize("group", [1, 4])
def test_groups_that_do_not_fit_are_refused(group):
    with pytest.raises(ValueError, match="groups of at least 2 that divide the 6 responses"):
        group_standardised(torch.zeros(6), group)
