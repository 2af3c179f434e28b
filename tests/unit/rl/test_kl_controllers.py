"""KL controllers by hand; that the adaptive one settles is in tests/invariant/test_rl_control.py."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tasks.core.errors import ConfigError, TrainingError
from tasks.rl.kl import AdaptiveKL, FixedKL


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.15),  # on target
        (6.6, 0.15 * (1 + 0.1 * 0.0512)),  # 10 % above; 512 of 10,000 episodes
        (5.4, 0.15 * (1 - 0.1 * 0.0512)),
        (7.2, 0.15 * (1 + 0.2 * 0.0512)),  # the largest error
        (60.0, 0.15 * (1 + 0.2 * 0.0512)),
        (0.0, 0.15 * (1 - 0.2 * 0.0512)),
        (-1.0, 0.15 * (1 - 0.2 * 0.0512)),  # a batch's estimate may be negative
    ],
)
def test_one_step_by_hand(kl: float, expected: float) -> None:
    controller = AdaptiveKL(0.15, target=6.0, horizon=10_000)
    controller.update(kl, 512)
    assert controller.kl_coef == pytest.approx(expected, rel=1e-14)


def test_steps_compound() -> None:
    controller = AdaptiveKL(1.0, target=2.0, horizon=10)
    controller.update(9.0, 5)  # · (1 + 0.2 · 5/10) = 1.1
    controller.update(9.0, 10)  # · (1 + 0.2 · 10/10) = 1.2
    assert controller.kl_coef == pytest.approx(1.32, rel=1e-14)


def test_fixed_stays_fixed() -> None:
    controller = FixedKL(0.05)
    controller.update(1000.0, 512)
    assert controller.kl_coef == 0.05


def test_a_penalty_of_zero_can_be_fixed() -> None:
    assert FixedKL(0.0).kl_coef == 0.0


@pytest.mark.parametrize("wrong", [-0.1, math.nan, math.inf])
def test_fixed_refuses_what_is_no_weight(wrong: float) -> None:
    with pytest.raises(ConfigError, match=r"^kl_coef must be finite and at least 0, got"):
        FixedKL(wrong)


@pytest.mark.parametrize("name", ["kl_coef", "target", "horizon"])
@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_adaptive_refuses_what_it_cannot_steer_with(name: str, wrong: float) -> None:
    arguments: dict[str, Any] = {"kl_coef": 0.15, "target": 6.0, "horizon": 10_000, name: wrong}
    key = {"target": "adaptive_kl_target", "horizon": "kl_horizon"}.get(name, name)
    with pytest.raises(ConfigError, match=rf"ppo\.{key} must be finite and above 0"):
        AdaptiveKL(**arguments)


@pytest.mark.parametrize("kl", [0.0, 6.0, 100.0])
def test_a_horizon_so_short_that_the_weight_could_vanish_is_refused_whatever_the_kl(kl: float) -> None:
    controller = AdaptiveKL(0.15, target=6.0, horizon=100)
    with pytest.raises(ConfigError, match=r"ppo\.kl_horizon = 100 is too short for 500 responses.*set it above 100,"):
        controller.update(kl, 500)  # 1 − 0.2 · 500/100 = 0
    controller.update(kl, 499)
    assert controller.kl_coef > 0


@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
def test_a_divergence_that_is_no_number_stops_the_training(kl: float) -> None:
    controller = AdaptiveKL(0.15, target=6.0, horizon=10_000)
    with pytest.raises(TrainingError, match="the KL to the reference is"):
        controller.update(kl, 512)
    assert controller.kl_coef == 0.15


def test_state_goes_through_a_checkpoint() -> None:
    before = AdaptiveKL(0.15, target=6.0, horizon=10_000)
    before.update(30.0, 512)
    after = AdaptiveKL(0.15, target=6.0, horizon=10_000)
    after.load_state_dict(before.state_dict())
    assert after.kl_coef == before.kl_coef != 0.15
    fixed = FixedKL(0.5)
    fixed.load_state_dict(FixedKL(0.05).state_dict())
    assert fixed.kl_coef == 0.05
