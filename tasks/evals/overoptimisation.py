"""Reward-model over-optimisation: proxy and gold reward against the distance from SFT (Gao et al. 2022).

Source: Gao, Schulman, Hilton 2022, "Scaling laws for reward model overoptimization" (arXiv 2210.10760). The distance is
d = √KL(policy ‖ SFT). The gain over SFT follows R(d) = d·(α − β·d) for best-of-n and R(d) = d·(α − β·log d) for
reinforcement learning (their equation 1); both are linear in α and β.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tasks.evals.compare import DIGITS, ScoredResponse
from tasks.evals.statistics import LEVEL, Interval, mean_and_error

__all__ = [
    "BEST_OF_N", "CurvePoint", "Fit", "best_of_n", "best_of_n_kl", "best_of_n_points", "curve", "curve_peak", "fit_all",
    "fit_curve", "policy_point", "score_matrix", "to_row",
]  # fmt: skip

Form = Literal["best_of_n", "rl"]
Numbers = NDArray[np.float64]
Scores = Mapping[str, Numbers]
"""Judge → [prompts, samples]."""

BEST_OF_N: Form = "best_of_n"
JUDGES = ("proxy", "gold")


@dataclass(frozen=True)
class CurvePoint:
    """Snapshot of a policy during training, or best-of-n for one n.

    Attributes:
        method: `best_of_n`, or the stage that trained the policy.
        number: n, or the update.
        kl: [prompts] nats per response.
        gains: judge → [prompts] over SFT, in standard deviations of the scores of SFT's responses.
    """

    method: str
    number: int
    kl: Numbers
    gains: Scores


def score_matrix(records: Sequence[ScoredResponse], prompts: int) -> Scores:
    """Score matrix [prompts, samples] of each judge; the records are ordered by prompt."""
    return {
        judge: np.array([record.scores[judge] for record in records], dtype=np.float64).reshape(prompts, -1)
        for judge in JUDGES
    }


def policy_point(method: str, number: int, records: Sequence[ScoredResponse], base: Scores) -> CurvePoint:
    """Compute the curve point of a policy with equally many responses per prompt, against SFT's responses."""
    policy_scores = score_matrix(records, len(base["proxy"]))
    kl = np.array([record.kl for record in records], dtype=np.float64).reshape(len(base["proxy"]), -1).mean(axis=1)
    gains = {judge: _standardised_gains(policy_scores[judge].mean(axis=1), base[judge]) for judge in JUDGES}
    return CurvePoint(method, number, kl, gains)


def best_of_n_points(base: Scores) -> list[CurvePoint]:
    """Compute the curve points of best of 2, 4, 8, … of SFT's responses, chosen by the proxy."""
    prompts, total = base["proxy"].shape
    points = []
    for n in (2**power for power in range(1, total.bit_length())):
        gains = {judge: _standardised_gains(best_of_n(base["proxy"], base[judge], n), base[judge]) for judge in JUDGES}
        points.append(CurvePoint(BEST_OF_N, n, np.full(prompts, best_of_n_kl(n)), gains))
    return points


def to_row(point: CurvePoint) -> dict[str, float | int | str]:
    """Convert to a table row: means over prompts, with the standard errors of the gains."""
    kl = float(point.kl.mean())
    row: dict[str, float | int | str] = {"method": point.method, "level": point.number, "kl": round(kl, DIGITS)}
    row["distance"] = round(math.sqrt(max(kl, 0.0)), DIGITS)
    for judge, values in point.gains.items():
        mean, error = mean_and_error(values.tolist())
        row |= {f"gain_{judge}": round(mean, DIGITS), f"gain_{judge}_stderr": round(error, DIGITS)}
    return row


def fit_all(points: Mapping[str, Sequence[CurvePoint]], *, samples: int, seed: int) -> dict[str, dict[str, Fit]]:
    """Fit every method and judge; methods with fewer than two points at KL > 0 are left out."""
    fitted: dict[str, dict[str, Fit]] = {}
    for method, own in points.items():
        kl = np.stack([point.kl for point in own])
        if (kl.mean(axis=1) > 0).sum() >= 2:
            form: Form = BEST_OF_N if method == BEST_OF_N else "rl"
            gains = {judge: np.stack([point.gains[judge] for point in own]) for judge in JUDGES}
            fitted[method] = {judge: fit_curve(form, kl, gains[judge], samples=samples, seed=seed) for judge in JUDGES}
    return fitted


def _standardised_gains(values: Numbers, base: Numbers) -> Numbers:
    std = float(base.std(ddof=1))
    gains: Numbers = (values - base.mean(axis=1)) / (std if std > 0 else 1.0)
    return gains


@dataclass(frozen=True)
class Fit:
    """A fitted form.

    Attributes:
        alpha, beta: with the 95 % interval of a bootstrap over prompts.
        peak: distance d of the curve's maximum, if it has one (β > 0).
        peak_fraction: fraction of the resamples with a peak within the measured distances.
        r2: 1 − residual / total sum of squares about 0, since R(0) = 0.
    """

    form: Form
    alpha: Interval
    beta: Interval
    peak: float | None
    peak_fraction: float
    r2: float


def best_of_n_kl(n: int) -> float:
    """KL(best-of-n ‖ base) = log n − (n − 1)/n, nats per response (Stiennon et al. 2020, arXiv 2009.01325, appendix G).

    Exact where no two responses are equal, an upper bound else (Beirami et al. 2024, arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def best_of_n(proxy: Numbers, values: Numbers, n: int) -> Numbers:
    """Unbiased expected value of the proxy's best of n, from N ≥ n samples per prompt.

    The i-th lowest by the proxy is the best of a random n of the N with probability C(i−1, n−1) / C(N, n) (Nakano et
    al. 2021, arXiv 2112.09332, appendix I).

    Args:
        proxy: [prompts, N] scores that choose.
        values: [prompts, N] scores that are averaged.

    Returns:
        [prompts].

    Raises:
        ValueError: n is not in 1 … N.
    """
    total = proxy.shape[1]
    if not 1 <= n <= total:
        raise ValueError(f"best of {n} from {total} samples: n must be between 1 and {total}")
    probabilities = np.array([math.comb(place, n - 1) for place in range(total)], dtype=object) / math.comb(total, n)
    order = np.argsort(proxy, axis=1, kind="stable")
    ranked: Numbers = np.take_along_axis(values, order, axis=1)
    return ranked @ probabilities.astype(np.float64)


def curve(form: Form, alpha: float, beta: float, distance: Numbers) -> Numbers:
    """R(d) of the form; 0 at d = 0."""
    return _basis(form, distance) @ np.array([alpha, beta])


def curve_peak(form: Form, alpha: float, beta: float) -> float | None:
    """Distance of the maximum of R: α / 2β, or exp(α/β − 1); None if R is monotonic."""
    if beta <= 0 or (alpha <= 0 and form == "best_of_n"):
        return None
    return alpha / (2 * beta) if form == "best_of_n" else math.exp(min(alpha / beta - 1, 50.0))


def fit_curve(form: Form, kl: Numbers, gains: Numbers, *, samples: int, seed: int) -> Fit:
    """Fit by least squares, with intervals from `samples` bootstrap resamples of the prompts.

    Args:
        kl: [levels, prompts] nats per response; for best-of-n the same number for every prompt.
        gains: [levels, prompts] over SFT.

    Raises:
        ValueError: fewer than two points have KL > 0.
    """
    nonzero = kl.mean(axis=1) > 0
    if nonzero.sum() < 2:
        raise ValueError(f"{int(nonzero.sum())} levels lie apart from SFT, a fit of two numbers needs two")
    kl, gains = kl[nonzero], gains[nonzero]
    alpha, beta, r2 = _solve(form, kl, gains)
    max_distance = math.sqrt(kl.mean(axis=1).max())
    rng = np.random.default_rng(seed)
    prompts = gains.shape[1]
    resamples = (rng.integers(prompts, size=prompts) for _ in range(samples))
    resampled = np.array([_solve(form, kl[:, own], gains[:, own])[:2] for own in resamples])
    peaks = [curve_peak(form, a, b) for a, b in resampled.tolist()]
    peak_fraction = sum(distance is not None and distance <= max_distance for distance in peaks) / samples
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).tolist()
    intervals = Interval(alpha, low[0], high[0]), Interval(beta, low[1], high[1])
    return Fit(form, *intervals, curve_peak(form, alpha, beta), peak_fraction, r2)


def _solve(form: Form, kl: Numbers, gains: Numbers) -> tuple[float, float, float]:
    distance = np.sqrt(np.maximum(kl.mean(axis=1), 0.0))
    gain = gains.mean(axis=1)
    basis = _basis(form, distance)
    (alpha, beta), *_ = np.linalg.lstsq(basis, gain, rcond=None)
    residual = gain - basis @ np.array([alpha, beta])
    total = float(gain @ gain)
    return float(alpha), float(beta), 1 - float(residual @ residual) / total if total else 0.0


def _basis(form: Form, distance: Numbers) -> Numbers:
    logs = np.log(np.where(distance > 0, distance, 1.0))
    second = distance**2 if form == "best_of_n" else distance * logs
    return np.stack([distance, -second], axis=1)
