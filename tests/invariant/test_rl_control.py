"""The adaptive controller settles at its target, on a plant that answers late, noisily and not linearly."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tasks.rl.kl import AdaptiveKL, FixedKL, KLController

TARGET = 6.0


def run(controller: KLController, updates: int = 6000, episodes: int = 64) -> list[float]:
    """KL after each update.

    For small β the policy that is best for reward − β · KL has a KL that goes as 1 / β² (rewards near normal); the
    policy moves a twentieth of the way there in an update, and each batch measures it with an error of 30 %.
    """
    rng = random.Random(0)
    kl, seen = 0.0, []
    for _ in range(updates):
        best = 0.375 / controller.kl_coef**2  # 6 nats at β = 0.25
        kl += 0.05 * (best - kl)
        seen.append(kl)
        controller.update(kl * rng.gauss(1, 0.3), episodes)
    return seen


@pytest.mark.parametrize("kl_coef", [0.1, 0.25, 0.8])
def test_it_settles_within_five_per_cent(kl_coef: float) -> None:
    controller = AdaptiveKL(kl_coef, target=TARGET, horizon=10_000)
    late = run(controller)[-1000:]
    assert sum(late) / len(late) == pytest.approx(TARGET, rel=0.05)
    assert min(late) > 0.85 * TARGET
    assert max(late) < 1.15 * TARGET
    assert controller.kl_coef == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize("make", [lambda: FixedKL(0.8), lambda: AdaptiveKL(0.8, target=0.6, horizon=10_000)])
def test_the_plant_alone_does_not_settle_there(make: Callable[[], KLController]) -> None:
    """A fixed weight stays at the KL of its own optimum, and another target leads elsewhere: 0.375 / 0.64 = 0.59."""
    late = run(make())[-1000:]
    assert sum(late) / len(late) == pytest.approx(0.59, rel=0.1)
