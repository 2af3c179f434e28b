"""Tokens as actions, and the response as one."""

from __future__ import annotations

import pytest
import torch

from tasks.rl.actions import action_mask, state_values, summed
from tasks.rl.advantages import leave_one_out

MASK = torch.tensor([[True, True, False], [True, True, True]])
VALUES = torch.tensor([[1.0, 2.0, 100.0], [3.0, 4.0, 5.0]])


def test_tokens_stay_as_they_are():
    assert summed(VALUES, MASK, "token") is VALUES
    assert state_values(VALUES, "token") is VALUES
    assert action_mask(MASK, "token") is MASK


def test_a_response_is_the_sum_of_its_tokens_and_its_state_is_the_prompt():
    assert summed(VALUES, MASK, "response").tolist() == [[3.0], [12.0]]
    assert state_values(VALUES, "response").tolist() == [[1.0], [3.0]]
    assert action_mask(MASK, "response").tolist() == [[True], [True]]


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
