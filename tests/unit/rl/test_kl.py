"""KL estimators and controllers by hand; estimates' expectations, and that β settles, are in tests/invariant."""

import math
from typing import Any

import pytest
import torch

from tasks.core.errors import ConfigError, TrainingError
from tasks.rl.kl import AdaptiveKL, FixedKL, kl_estimates, per_sequence

NAN, INF = math.nan, math.inf


def test_estimates_by_hand() -> None:
    # Δ = ln 2: k1 = ln 2, k2 = (ln 2)² / 2, k3 = 1/2 − 1 + ln 2.   Δ = −ln 2: k3 = 2 − 1 − ln 2.
    ln2 = math.log(2)
    logprobs = torch.log(torch.tensor([[0.5, 0.25, 0.3], [0.1, NAN, -INF]], dtype=torch.float64))
    reference = torch.log(torch.tensor([[0.25, 0.5, 0.3], [0.2, 0.5, 0.5]], dtype=torch.float64))
    mask = torch.tensor([[True, True, True], [True, False, False]])
    kl = kl_estimates(logprobs, reference, mask)
    assert kl.k1.flatten().tolist() == pytest.approx([ln2, -ln2, 0, -ln2, 0, 0], abs=1e-15)
    assert kl.k2.flatten().tolist() == pytest.approx([ln2**2 / 2, ln2**2 / 2, 0, ln2**2 / 2, 0, 0], abs=1e-15)
    assert kl.k3.flatten().tolist() == pytest.approx([ln2 - 0.5, 1 - ln2, 0, 1 - ln2, 0, 0], abs=1e-15)


def test_equal_policies_have_no_divergence_at_all_and_k3_of_near_ones_survives_float32() -> None:
    logprobs = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    kl = kl_estimates(logprobs, logprobs.clone(), torch.ones(3, 5, dtype=torch.bool))
    for estimate in (kl.k1, kl.k2, kl.k3):
        assert estimate.eq(0).all(), "KL to oneself must be exactly 0, or the reward is not the score at step 0"
    # Δ = 1e-4: k3 = Δ²/2 = 5e-9. Computed as exp(−Δ) − 1 + Δ it is lost: float32 rounds exp to steps of 6e-8.
    delta = torch.tensor([[1e-4]])
    kl = kl_estimates(delta, torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
    assert kl.k3.item() == pytest.approx(5e-9, rel=1e-2)


def test_per_sequence_sums_the_tokens_that_count() -> None:
    kl = torch.tensor([[1.0, 2.0, 4.0], [0.5, NAN, INF]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert per_sequence(kl, mask).tolist() == [7.0, 0.5]


# -- controllers -------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kl_coef", [0.05, 0.0])
def test_fixed_stays_fixed(kl_coef: float) -> None:
    controller = FixedKL(kl_coef)
    controller.update(1000.0, 512)
    assert controller.kl_coef == kl_coef


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
