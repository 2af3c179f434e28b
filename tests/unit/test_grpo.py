"""GRPO's curves under PPO's names, against figures worked by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tasks.grpo import _rounds, _Score
from tasks.rewards.composition import CompositeReward
from tests.unit.tiny_stages import _GRPO


def test_a_row_is_one_update_with_kl_from_its_first_step():
    steps = [
        {"loss": 1.0, "kl": 0.1, "entropy": 4.0, "grad_norm": 1.0, "learning_rate": 0.4, "clip_ratio/region_mean": 0.0},
        {"loss": 3.0, "kl": 9.0, "entropy": 2.0, "grad_norm": 3.0, "learning_rate": 0.2, "clip_ratio/region_mean": 0.5},
        {"loss": 5.0, "kl": 0.2, "entropy": 1.0, "grad_norm": 1.0, "learning_rate": 0.1, "clip_ratio/region_mean": 0.0},
        {"loss": 5.0, "kl": 0.3, "entropy": 1.0, "grad_norm": 1.0, "learning_rate": 0.1, "clip_ratio/region_mean": 0.0},
    ]
    rollouts = [
        {"reward": 0.5, "length": 20.0, "reward/a": 0.5, "reward/b": 1.0},
        {"reward": 0.7, "length": 10.0, "reward/a": 2.0, "reward/b": 0.5},
    ]
    first, second = _rounds(steps, rollouts, 2, lambda update: {"a": 1.0, "b": 1.0})
    assert first["step"] == 1
    assert first["kl"] == pytest.approx(0.1 * 20)
    assert (first["loss"], first["entropy"], first["clip_fraction"]) == (2.0, 3.0, 0.25)
    assert second["kl"] == pytest.approx(0.2 * 10)
    assert (second["step"], second["reward"]) == (2, 0.7)
    assert first["hacking/length_drift"] == 1
    assert second["hacking/length_drift"] == 2
    assert second["hacking/entropy_collapse"] == 3
    assert second["hacking/one_component_pays"] == pytest.approx(0.5), "1.5 gained by a, 0.5 lost by b: 0.5 of 1"


class Noticing:
    def __call__(self, prompts, responses):
        raise AssertionError("a second pass")

    def measured(self, prompts, responses):
        return torch.tensor([1.0, 2.0, 3.0, 4.0]), {"unfamiliar": torch.tensor([0.0, 1.0, 1.0, 1.0])}


def test_what_the_reward_notices_is_in_the_row_and_watched():
    state = SimpleNamespace(global_step=0, log_history=[])
    score = _Score(CompositeReward({"a": Noticing()}, {"a": 1.0}), _GRPO, eos_token_id=1)
    assert score(["p"] * 4, list("wxyz"), completion_ids=[[5, 1]] * 4, trainer_state=state) == [1.0, 2.0, 3.0, 4.0]
    (entry,) = state.log_history
    assert entry["unfamiliar"] == 0.75
    rows = _rounds([{"loss": 0.0}] * 2, [entry | {"unfamiliar": 0.25}, entry], 1, lambda update: {"a": 1.0})
    assert [row["hacking/unfamiliar_responses"] for row in rows] == [0.0, 0.5]
