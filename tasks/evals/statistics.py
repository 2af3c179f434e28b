"""Means with confidence intervals: standard errors, bootstrap and t intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
import scipy  # scipy.stats takes a second to import, which scipy does at its first use

__all__ = [
    "LEVEL", "TIE_TOLERANCE", "Interval", "bootstrap_mean", "mean_and_error", "t_interval", "wilson_interval",
]  # fmt: skip

TIE_TOLERANCE = 1e-5
"""Scores closer than this are a tie: padding changes the last digits of the score of one text."""

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the interval around it; low ≤ high."""

    mean: float
    low: float
    high: float


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Compute the mean and its standard error s/√n (s with n − 1); the error is 0 for a single value.

    Exact sums: equal values have no error, while numpy and scipy.stats.sem leave some in the last digit.

    Raises:
        ValueError: there is no value.
    """
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def bootstrap_mean(values: Sequence[float], *, samples: int, seed: int) -> Interval:
    """Percentile bootstrap (95 %) of a mean, from `samples` resamples (Efron and Tibshirani 1993, chapter 13).

    With one value per prompt the interval says how much the result depends on which prompts were asked, and not how
    much on the randomness of training. When all values are equal it has no width.

    Raises:
        ValueError: there is no value.
    """
    mean = fmean(values)
    if len(values) == 1:
        return Interval(mean, mean, mean)
    found = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=samples, confidence_level=LEVEL, method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(mean, float(found.low), float(found.high))


def wilson_interval(share: float, n: int) -> Interval:
    """Wilson score interval (95 %) of a share of n trials, which stays in [0, 1].

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference", J. Am. Stat. Assoc. 22.

    Raises:
        ValueError: there was no trial.
    """
    if n < 1:
        raise ValueError("the share of no trials")
    found = scipy.stats.binomtest(round(share * n), n).proportion_ci(LEVEL, method="wilson")
    return Interval(share, float(found.low), float(found.high))


def t_interval(values: Sequence[float]) -> Interval:
    """Mean ± t·s/√n (95 %) with Student's t for n − 1 degrees of freedom: for a few independent values, as of seeds.

    It says how much the mean depends on the seeds that were drawn (Colas et al. 2018, arXiv 1806.08295), not on the
    prompts, which all seeds share.

    Raises:
        ValueError: there are fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"an interval over {len(values)} values")
    mean, error = mean_and_error(values)
    # scipy.stats.t.interval is NaN where the error is 0.
    half = float(scipy.stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error
    return Interval(mean, mean - half, mean + half)
