"""Means with confidence intervals: standard errors, bootstrap intervals, paired win rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "TIE_TOLERANCE",
    "Interval",
    "bootstrap_mean",
    "mean_and_error",
    "pairwise_wins",
    "t_interval",
    "wilson_interval",
    "win_rate",
]

TIE_TOLERANCE = 1e-5
"""Scores closer than this are a tie: padding changes the last digits of the score of one text."""


@dataclass(frozen=True)
class Interval:
    """A mean and the interval around it; low ≤ high."""

    mean: float
    low: float
    high: float


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Compute the mean and its standard error s/√n (s with n − 1); the error is 0 for a single value.

    Raises:
        ValueError: there is no value.
    """
    n = len(values)
    if n == 0:
        raise ValueError("the mean of no values")
    mean = math.fsum(values) / n
    if n == 1:
        return mean, 0.0
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def bootstrap_mean(values: Sequence[float], *, samples: int, seed: int, level: float = 0.95) -> Interval:
    """Percentile bootstrap of a mean (Efron and Tibshirani 1993, chapter 13): resample the values with replacement.

    One value per prompt goes in, so the interval says how much the result depends on which prompts were asked. It
    does not cover the randomness of training (run more seeds for that). When all values are equal it has no width.

    Args:
        samples: how many resamples.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("the bootstrap of no values")
    data = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = [float(data[rng.integers(data.size, size=data.size)].mean()) for _ in range(samples)]
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(math.fsum(values) / len(values), float(low), float(high))


def wilson_interval(share: float, n: int) -> Interval:
    """Wilson score interval (95 %) of a share of n trials, which stays in [0, 1].

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference", J. Am. Stat. Assoc. 22.

    Raises:
        ValueError: there was no trial.
    """
    if n < 1:
        raise ValueError("the share of no trials")
    z2 = 1.96**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = 1.96 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def t_interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """Mean ± t·s/√n with Student's t for n − 1 degrees of freedom: for a few independent values, such as of seeds.

    It says how much the mean depends on the seeds that were drawn (Colas et al. 2018, arXiv 1806.08295), and
    not on the prompts, which all seeds share.

    Raises:
        ValueError: there are fewer than two values.
    """
    from scipy.special import stdtrit  # slow to import

    if len(values) < 2:
        raise ValueError(f"an interval over {len(values)} values")
    mean, error = mean_and_error(values)
    half = float(stdtrit(len(values) - 1, (1 + level) / 2)) * error
    return Interval(mean, mean - half, mean + half)


def pairwise_wins(scores: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Compare per prompt: 1 for a win by more than TIE_TOLERANCE, ½ for a tie, 0 for a loss.

    Raises:
        ValueError: the two differ in length.
    """
    return [
        0.5 if abs(score - other) <= TIE_TOLERANCE else float(score > other)
        for score, other in zip(scores, reference, strict=True)
    ]


def win_rate(scores: Sequence[float], reference: Sequence[float], *, samples: int, seed: int) -> Interval:
    """Win rate against the reference, paired by prompt, ties counting ½, with its 95 % bootstrap interval.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    return bootstrap_mean(pairwise_wins(scores, reference), samples=samples, seed=seed)
