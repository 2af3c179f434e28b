"""Controls of a win rate: what it is at equal length, what it can be at most, and when it is no evidence; pass@k."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import scipy  # scipy.special and scipy.optimize are imported at their first use
from numpy.typing import NDArray

from tasks.evals.statistics import LEVEL, TIE_TOLERANCE, Interval, bootstrap_mean

__all__ = ["Numbers", "doubt", "length_controlled", "pair_wins", "pass_at_k", "subset_win_rate", "win_rate_bound"]

Numbers = NDArray[np.float64]

NEWTON_STEPS, RIDGE = 50, 1e-3
"""Most steps of the fit; and a penalty on its squared coefficients, so small that it counts only where the data
separate, and the coefficients of the likelihood alone would be infinite."""


def pair_wins(own: Numbers, reference: Numbers) -> Numbers:
    """Compare all pairs of draws of a prompt: [n, m] and [n, k] → [n, m, k], 1 for a win, ½ for a tie, 0 for a loss."""
    difference = own[:, :, None] - reference[:, None, :]
    return np.where(np.abs(difference) <= TIE_TOLERANCE, 0.5, (difference > 0).astype(np.float64))


def subset_win_rate(
    wins: Numbers, chosen: NDArray[np.bool_], *, samples: int, seed: int
) -> tuple[Interval, int] | None:
    """Win rate over chosen pairs alone, and their number; None where no pair is chosen.

    It is the mean over prompts of the mean over the prompt's chosen pairs, with a bootstrap interval over prompts. What
    is chosen by the responses themselves is not a random part of them: read it beside the whole.

    Args:
        wins, chosen: [n, m, k].
    """
    counts = chosen.sum(axis=(1, 2))
    means = (wins * chosen).sum(axis=(1, 2))[counts > 0] / counts[counts > 0]
    return (bootstrap_mean(means.tolist(), samples=samples, seed=seed), int(counts.sum())) if len(means) else None


def length_controlled(wins: Numbers, length_differences: Numbers, *, samples: int, seed: int) -> Interval:
    """Win rate at equal length, with a bootstrap interval (95 %) over prompts: σ(θ) of the logistic regression

        P(win) = σ(θ + φ · tanh(Δ / std(Δ))),   Δ = the response's length less the reference's,

    fitted to all pairs, ties as ½. That is Dubois et al. 2024 (arXiv 2404.04475), section 3, without the difficulty of
    the instruction, which needs many models; Δ is not centred, so that Δ = 0 means equal length.

    Args:
        wins, length_differences: [n, m, k].
    """
    spread = float(length_differences.std()) or 1.0
    feature = np.tanh(length_differences / spread).reshape(len(wins), -1)
    outcome = wins.reshape(len(wins), -1)
    start = _fit_logistic(outcome, feature, np.zeros(2))
    rng = np.random.default_rng(seed)
    resamples = (rng.integers(len(wins), size=len(wins)) for _ in range(samples))
    thetas = [_fit_logistic(outcome[rows], feature[rows], start)[0] for rows in resamples]
    low, high = np.quantile(scipy.special.expit(thetas), [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return Interval(float(scipy.special.expit(start[0])), low, high)


def _fit_logistic(outcome: Numbers, feature: Numbers, start: Numbers) -> Numbers:
    """(θ, φ) of the highest penalised likelihood, by Newton's method."""
    coefficients = start.copy()
    for _ in range(NEWTON_STEPS):
        rate = scipy.special.expit(coefficients[0] + coefficients[1] * feature)
        error, weight = outcome - rate, rate * (1 - rate)
        gradient = np.array([error.sum(), (error * feature).sum()]) - RIDGE * coefficients
        mixed = (weight * feature).sum()
        hessian = np.array([[weight.sum(), mixed], [mixed, (weight * feature**2).sum()]]) + RIDGE * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        coefficients += step / max(1.0, float(np.abs(step).max()))  # at most 1: far from the maximum Newton overshoots
        if np.abs(step).max() < 1e-8:
            break
    return coefficients


def win_rate_bound(kl: float) -> float:
    """Highest win rate that a policy can have against its reference, by any judge, at KL(policy ‖ reference) nats.

    For independent draws y of the policy and y' of the reference the win rate is E_π f with f(y) = P(y' is worse) +
    ½ P(tie). Under the reference f = E[U | y] of a uniform U, the rank of y with ties broken at random. So for each
    λ > 0, by Donsker and Varadhan's inequality and then Jensen's,

        E_π f ≤ (KL + log E_ref e^(λf)) / λ ≤ (KL + log E e^(λU)) / λ,   E e^(λU) = (e^λ − 1) / λ,

    and the bound is the least of these. A judge whose scores never tie can reach it. It is concave in KL, so it holds
    for means over prompts. It lies below Pinsker's ½ + √(KL / 2), which follows by Hoeffding's lemma and passes 1 at ½
    nat; near 0 it is ½ + √(KL / 6).
    """
    if kl <= 0:
        return 0.5

    def bound(log_lambda: float) -> float:
        lam = math.exp(log_lambda)
        return (kl + lam + math.log(-math.expm1(-lam) / lam)) / lam

    found = scipy.optimize.minimize_scalar(bound, bounds=(-9.0, 9.0), method="bounded", options={"xatol": 1e-9})
    return min(1.0, float(found.fun))


def pass_at_k(correct: Numbers, k: int) -> list[float]:
    """Probability that one of k draws is right, for each prompt: 1 − C(m − c, k) / C(m, k) for c right ones of m.

    Unbiased for each k ≤ m: Chen et al. 2021 (arXiv 2107.03374), equation 1.

    Args:
        correct: [n, m], 1 for a right answer and 0 for a wrong one.
    """
    m = correct.shape[1]
    return [1 - math.comb(m - int(right), k) / math.comb(m, k) for right in correct.sum(axis=1)]


def doubt(row: Mapping[str, float]) -> str:
    """Reason why the gold judge's win rate in a policy's row is no evidence, or "" where there is none.

    The row of an evaluation without controls has none.
    """
    rate, bound = row["win_rate"], row.get("win_rate_bound", 1.0)
    null = row.get("win_rate_null", 0.5)
    if row["win_rate_low"] > bound or row["win_rate_high"] < 1 - bound:
        return (
            f"a win rate of {rate:.0%} is impossible at a KL of {max(row['kl'], 0.0):.2f} nats, where it lies between "
            f"{1 - bound:.0%} and {bound:.0%}: it is noise"
        )
    if null != 0.5 and abs(null - 0.5) >= abs(rate - 0.5):
        return f"SFT against itself is as far from 50%: {null:.1%} against {rate:.1%}"
    return ""
