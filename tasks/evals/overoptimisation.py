"""Reward-model over-optimisation: how proxy and gold reward go with the distance from SFT (Gao et al. 2022).

Source: Gao, Schulman, Hilton 2022, "Scaling laws for reward model overoptimization" (arXiv 2210.10760). The distance is
d = √KL(policy ‖ SFT). The gain over SFT follows R(d) = d·(α − β·d) for best-of-n and R(d) = d·(α − β·log d) for
reinforcement learning (their equation 1); both are linear in α and β.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tasks.evals.statistics import Interval

__all__ = ["Fit", "Form", "best_of_n", "best_of_n_kl", "curve", "fit", "peak"]

Form = Literal["best_of_n", "rl"]
Numbers = NDArray[np.float64]

LEVEL = 0.95


@dataclass(frozen=True)
class Fit:
    """A fitted form.

    Attributes:
        alpha, beta: with the 95 % interval of a bootstrap over prompts.
        peak: the distance d at which the curve is highest, if it has a highest point (β > 0).
        peak_share: in which share of the resamples it has one within the distances that were measured.
        r2: 1 − residual / total sum of squares about 0, since R(0) = 0.
    """

    form: Form
    alpha: Interval
    beta: Interval
    peak: float | None
    peak_share: float
    r2: float

    def plain(self) -> dict[str, Any]:
        """As JSON can say it."""
        return asdict(self)


def best_of_n_kl(n: int) -> float:
    """KL(best-of-n ‖ base) = log n − (n − 1)/n, nats per response (Stiennon et al. 2020, arXiv 2009.01325, appendix G).

    Exact where no two responses are equal, an upper bound else (Beirami et al. 2024, arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def best_of_n(proxy: Numbers, values: Numbers, n: int) -> Numbers:
    """The expected value of the response that the proxy likes best among n, without bias, from N ≥ n samples a prompt.

    The i-th lowest by the proxy is the best of a random n of the N with probability C(i−1, n−1) / C(N, n) (Nakano et
    al. 2021, arXiv 2112.09332, appendix I).

    Args:
        proxy: [prompts, N] what chooses.
        values: [prompts, N] what is averaged.

    Returns:
        [prompts].

    Raises:
        ValueError: n is not in 1 … N.
    """
    total = proxy.shape[1]
    if not 1 <= n <= total:
        raise ValueError(f"best of {n} from {total} samples: n must be between 1 and {total}")
    chances = np.array([math.comb(place, n - 1) for place in range(total)], dtype=object) / math.comb(total, n)
    order = np.argsort(proxy, axis=1, kind="stable")
    ranked: Numbers = np.take_along_axis(values, order, axis=1)
    return ranked @ chances.astype(np.float64)


def curve(form: Form, alpha: float, beta: float, distance: Numbers) -> Numbers:
    """R(d) of the form; 0 at d = 0."""
    return _basis(form, distance) @ np.array([alpha, beta])


def peak(form: Form, alpha: float, beta: float) -> float | None:
    """The distance at which R is highest: α / 2β, or exp(α/β − 1); None where it rises for ever or never."""
    if beta <= 0 or (alpha <= 0 and form == "best_of_n"):
        return None
    return alpha / (2 * beta) if form == "best_of_n" else math.exp(min(alpha / beta - 1, 50.0))


def fit(form: Form, kl: Numbers, gains: Numbers, *, samples: int, seed: int) -> Fit:
    """Least squares over the levels, with intervals from resampled prompts.

    Args:
        kl: [levels, prompts] nats per response; for best-of-n the same number for every prompt.
        gains: [levels, prompts] over SFT.
        samples: bootstrap resamples.

    Raises:
        ValueError: fewer than two levels lie apart from SFT, so that nothing is determined.
    """
    alpha, beta, r2 = _solve(form, kl, gains)
    reach = math.sqrt(max(kl.mean(axis=1).max(), 0.0))
    draw = np.random.default_rng(seed)
    prompts = gains.shape[1]
    drawn = []
    for _ in range(samples):
        chosen = draw.integers(prompts, size=prompts)
        drawn.append(_solve(form, kl[:, chosen], gains[:, chosen])[:2])
    resampled = np.array(drawn)
    peaks = [peak(form, a, b) for a, b in resampled.tolist()]
    inside = sum(place is not None and place <= reach for place in peaks) / samples
    intervals = [_interval(value, column) for value, column in zip((alpha, beta), resampled.T, strict=True)]
    return Fit(form, intervals[0], intervals[1], peak(form, alpha, beta), inside, r2)


def _solve(form: Form, kl: Numbers, gains: Numbers) -> tuple[float, float, float]:
    distance = np.sqrt(np.maximum(kl.mean(axis=1), 0.0))
    gain = gains.mean(axis=1)
    apart = distance > 0
    if apart.sum() < 2:
        raise ValueError(f"{int(apart.sum())} levels lie apart from SFT, a fit of two numbers needs two")
    basis = _basis(form, distance)
    (alpha, beta), *_ = np.linalg.lstsq(basis, gain, rcond=None)
    residual = gain - basis @ np.array([alpha, beta])
    total = float(gain @ gain)
    return float(alpha), float(beta), 1 - float(residual @ residual) / total if total else 0.0


def _basis(form: Form, distance: Numbers) -> Numbers:
    logs = np.log(np.where(distance > 0, distance, 1.0))
    second = distance**2 if form == "best_of_n" else distance * logs
    return np.stack([distance, -second], axis=1)


def _interval(value: float, resampled: Numbers) -> Interval:
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
