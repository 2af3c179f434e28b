"""KL estimators and controllers by hand; estimates' expectations, and that β settles, are in tests/invariant."""

import math

import pytest
import torch

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
