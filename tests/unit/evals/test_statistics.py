import numpy as np
import pytest

from tasks.evals.statistics import (
    TIE_TOLERANCE,
    bootstrap_mean,
    mean_and_error,
    pairwise_wins,
    t_interval,
    wilson_interval,
    win_rate,
)


def test_mean_and_error_by_hand() -> None:
    # mean 3; squared deviations 4, 1, 0, 1, 4 sum to 10; s² = 10/4; s²/n = ½
    assert mean_and_error([1, 2, 3, 4, 5]) == pytest.approx((3.0, 0.5**0.5))
    assert mean_and_error([7.0]) == (7.0, 0.0)
    with pytest.raises(ValueError, match="no values"):
        mean_and_error([])


def test_the_t_interval_by_hand() -> None:
    """Mean 2.5, s² = 5/3, s/√4 = 0.645497; in Student’s table, 3 degrees of freedom: 3.182 for 95 %, 5.841 for 99 %."""
    interval = t_interval([1.0, 2.0, 3.0, 4.0])
    assert interval.mean == 2.5
    assert (interval.high - 2.5, 2.5 - interval.low) == pytest.approx((3.182 * 0.645497,) * 2, abs=5e-4)
    assert t_interval([1.0, 2.0, 3.0, 4.0], level=0.99).high == pytest.approx(2.5 + 5.841 * 0.645497, abs=5e-4)
    with pytest.raises(ValueError, match="an interval over 1 values"):
        t_interval([1.0])


def test_wins_are_paired_and_ties_count_half() -> None:
    assert pairwise_wins([2.0, 1.0, 1.0, 1.0 + TIE_TOLERANCE / 2], [1.0, 2.0, 1.0, 1.0]) == [1.0, 0.0, 0.5, 0.5]
    with pytest.raises(ValueError, match=r"zip\(\) argument 2"):
        pairwise_wins([1.0], [1.0, 2.0])


def test_win_rate_is_the_share_of_wins_with_ties_as_half() -> None:
    rate = win_rate([3, 3, 3, 1, 2], [2, 2, 2, 2, 2], samples=200, seed=0)
    assert rate.mean == pytest.approx(0.7)  # (3 + ½) / 5
    assert rate.low < 0.7 < rate.high


def test_pairing_matters() -> None:
    """The same two sets of scores, paired differently, give another win rate."""
    assert win_rate([1, 2, 3], [0, 1, 2], samples=10, seed=0).mean == 1.0
    assert win_rate([1, 2, 3], [2, 1, 0], samples=10, seed=0).mean == pytest.approx(2 / 3)


def test_the_interval_is_that_of_the_binomial_distribution() -> None:
    """Resampling 0/1 outcomes draws Binomial(n, p)/n, whose quantiles are known: n = 100, p = 0.6 gives 0.50–0.69.

    From the cumulative distribution: P(X ≤ 49) = 0.0168, P(X ≤ 50) = 0.0271, P(X ≤ 68) = 0.9602, P(X ≤ 69) = 0.9752.
    """
    interval = bootstrap_mean([1.0] * 60 + [0.0] * 40, samples=20_000, seed=1)
    assert interval.low == pytest.approx(0.50, abs=0.0101)
    assert interval.high == pytest.approx(0.69, abs=0.0101)


def test_the_interval_covers_the_truth_in_about_95_of_100_repetitions() -> None:
    draw = np.random.default_rng(0)
    hits = 0
    for repetition in range(400):
        interval = bootstrap_mean(list(draw.normal(size=60)), samples=400, seed=repetition)
        hits += interval.low <= 0.0 <= interval.high
    assert (
        0.91 <= hits / 400 <= 0.98
    )  # 95 % less the small-sample loss of the percentile bootstrap, ± 2 standard errors


def test_the_interval_follows_from_the_seed_and_has_no_width_without_spread() -> None:
    values = [0.0, 1.0, 1.0, 0.5]
    assert bootstrap_mean(values, samples=50, seed=3) == bootstrap_mean(values, samples=50, seed=3)
    assert bootstrap_mean(values, samples=50, seed=3) != bootstrap_mean(values, samples=50, seed=4)
    certain = bootstrap_mean([1.0] * 5, samples=50, seed=0)
    assert (certain.mean, certain.low, certain.high) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean([], samples=1, seed=0)


def test_the_interval_of_a_share_is_where_the_score_test_keeps_it() -> None:
    """The ends solve (p̂ − p)² = z² p (1 − p) / n; at p̂ = 1 the lower one is n / (n + z²)."""
    found = wilson_interval(0.7, 10)
    for end in (found.low, found.high):
        assert (0.7 - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / 10)
    assert found.low < 0.7 < found.high
    assert (wilson_interval(1.0, 5).low, wilson_interval(1.0, 5).high) == pytest.approx((5 / (5 + 1.96**2), 1.0))
    assert wilson_interval(0.0, 5).low == 0.0
    with pytest.raises(ValueError, match="no trials"):
        wilson_interval(0.5, 0)
