from statistics import NormalDist

import numpy as np
import pytest

from tasks.evals.controls import pair_wins
from tasks.evals.statistics import Interval, bootstrap_mean, mean_and_error, t_interval, wilson_interval

Z = NormalDist().inv_cdf(0.975)


def test_mean_and_error_by_hand() -> None:
    # mean 3; squared deviations 4, 1, 0, 1, 4 sum to 10; s² = 10/4; s²/n = ½
    assert mean_and_error([1, 2, 3, 4, 5]) == pytest.approx((3.0, 0.5**0.5))
    assert mean_and_error([7.0]) == (7.0, 0.0)
    assert mean_and_error([0.1] * 7) == (pytest.approx(0.1), 0.0), "equal values leave an error in the last digit"
    with pytest.raises(ValueError, match="at least one data point"):
        mean_and_error([])


def test_the_t_interval_by_hand() -> None:
    """Mean 2.5, s² = 5/3, s/√4 = 0.645497; in Student’s table, 3 degrees of freedom: 3.182 for 95 %."""
    interval = t_interval([1.0, 2.0, 3.0, 4.0])
    assert interval.mean == 2.5
    assert (interval.high - 2.5, 2.5 - interval.low) == pytest.approx((3.182 * 0.645497,) * 2, abs=5e-4)
    equal = t_interval([0.6, 0.6, 0.6])
    assert (equal.low, equal.mean, equal.high) == (0.6, 0.6, 0.6)
    with pytest.raises(ValueError, match="an interval over 1 values"):
        t_interval([1.0])


@pytest.mark.parametrize(
    ("scores", "reference", "rate"),
    [
        ([3, 3, 3, 1, 2], [2, 2, 2, 2, 2], 0.7),  # (3 + ½) / 5
        ([1, 2, 3], [0, 1, 2], 1.0),
        ([1, 2, 3], [2, 1, 0], 2 / 3),  # the same scores, paired differently
    ],
)
def test_the_mean_of_wins_is_the_win_rate(scores: list[float], reference: list[float], rate: float) -> None:
    wins = pair_wins(*(np.array(values, dtype=float)[:, None] for values in (scores, reference)))
    interval = bootstrap_mean(wins.ravel().tolist(), samples=200, seed=0)
    assert interval.mean == pytest.approx(rate)
    assert interval.low < rate < interval.high or rate == 1.0


def test_the_interval_is_that_of_the_binomial_distribution() -> None:
    """Resampling 0/1 outcomes draws Binomial(n, p)/n, whose quantiles are known: n = 100, p = 0.6 gives 0.50–0.69.

    From the cumulative distribution: P(X ≤ 49) = 0.0168, P(X ≤ 50) = 0.0271, P(X ≤ 68) = 0.9602, P(X ≤ 69) = 0.9752.
    """
    interval = bootstrap_mean([1.0] * 60 + [0.0] * 40, samples=20_000, seed=1)
    assert interval.low == pytest.approx(0.50, abs=0.0101)
    assert interval.high == pytest.approx(0.69, abs=0.0101)


def test_the_interval_covers_the_truth_in_about_95_of_100_repetitions() -> None:
    draw = np.random.default_rng(0)
    found = [bootstrap_mean(list(draw.normal(size=60)), samples=400, seed=repetition) for repetition in range(400)]
    # 95 % less the small-sample loss of the percentile bootstrap, ± 2 standard errors
    assert 0.91 <= sum(interval.low <= 0.0 <= interval.high for interval in found) / 400 <= 0.98


def test_the_interval_follows_from_the_seed_and_has_no_width_without_spread() -> None:
    values = [0.0, 1.0, 1.0, 0.5]
    assert bootstrap_mean(values, samples=50, seed=3) == bootstrap_mean(values, samples=50, seed=3)
    assert bootstrap_mean(values, samples=50, seed=3) != bootstrap_mean(values, samples=50, seed=4)
    assert bootstrap_mean([1.0] * 5, samples=50, seed=0) == Interval(1.0, 1.0, 1.0)
    assert bootstrap_mean([0.5], samples=50, seed=0) == Interval(0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="at least one data point"):
        bootstrap_mean([], samples=1, seed=0)


def test_the_interval_of_a_share_is_where_the_score_test_keeps_it() -> None:
    """The ends solve (p̂ − p)² = z² p (1 − p) / n; at p̂ = 1 the lower one is n / (n + z²)."""
    found = wilson_interval(0.7, 10)
    for end in (found.low, found.high):
        assert (0.7 - end) ** 2 == pytest.approx(Z**2 * end * (1 - end) / 10)
    assert found.low < 0.7 < found.high
    assert (wilson_interval(1.0, 5).low, wilson_interval(1.0, 5).high) == pytest.approx((5 / (5 + Z**2), 1.0))
    assert wilson_interval(0.0, 5).low == 0.0
    with pytest.raises(ValueError, match="no trials"):
        wilson_interval(0.5, 0)
