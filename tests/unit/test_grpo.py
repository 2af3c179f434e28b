"""GRPO's curves under PPO's names, against figures worked by hand."""

from __future__ import annotations

import pytest

from tasks.grpo import _rounds


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
    first, second = _rounds(steps, rollouts, 2, {"a": 1.0, "b": 1.0})
    assert first["step"] == 1
    assert first["kl"] == pytest.approx(0.1 * 20)
    assert (first["loss"], first["entropy"], first["clip_fraction"]) == (2.0, 3.0, 0.25)
    assert second["kl"] == pytest.approx(0.2 * 10)
    assert (second["step"], second["reward"]) == (2, 0.7)
    assert first["hacking/length_drift"] == 1
    assert second["hacking/length_drift"] == 2
    assert second["hacking/entropy_collapse"] == 3
    assert second["hacking/one_component_pays"] == pytest.approx(0.5), "1.5 gained by a, 0.5 lost by b: 0.5 of 1"
