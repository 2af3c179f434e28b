"""Win rates over seeds and prompts: bootstrap over both, and the difference that so many of them can show."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy  # scipy.stats takes a second to import, which scipy does at its first use

from tasks.evals.controls import pair_wins
from tasks.evals.statistics import LEVEL

__all__ = ["SeedValues", "bootstrap_seeds", "detectable_difference", "variance_components", "wins_by_prompt"]

SAMPLES, SEED = 2000, 0
"""Resamples of the bootstrap, and the seed that draws them."""

POWER = 0.8

SeedValues = Sequence[Mapping[str, float]]
"""For each seed: prompt → a policy's win rate there, or the difference of two policies' win rates."""


def wins_by_prompt(responses: Iterable[Mapping[str, Any]], reference: str) -> dict[str, dict[str, float]]:
    """Policy → prompt → win rate by the gold judge, over all pairs of a draw of the policy and one of the reference.

    Args:
        responses: rows of responses.jsonl; prompts that the reference did not answer are left out.
    """
    scores: dict[str, dict[str, list[float]]] = {}
    for row in responses:
        scores.setdefault(row["policy"], {}).setdefault(row["prompt_id"], []).append(row["gold"])
    base = scores.pop(reference, {})
    return {
        policy: {
            prompt: float(pair_wins(np.array([drawn]), np.array([base[prompt]])).mean())
            for prompt, drawn in own.items()
            if prompt in base
        }
        for policy, own in scores.items()
    }


def bootstrap_seeds(values: SeedValues, *, null: float) -> dict[str, float]:
    """`mean` of the seeds' means, `low` and `high` (95 %), and the two-sided `p_value` of a mean of `null`.

    Seeds are resampled, and within each its prompts (Davison and Hinkley 1997, section 3.8). Where all seeds answered
    the same prompts, one resample of these serves all seeds (two crossed factors: Owen 2007, arXiv 0712.1111). The
    noise of the prompts is in the seeds' means already and counts once more, so the interval is up to √2 too wide where
    seeds hardly differ; where they do, it is too narrow by √((n − 1)/n) for n seeds. Student's interval is neither.
    """
    rng, count = np.random.default_rng(SEED), len(values)
    common = all(own.keys() == values[0].keys() for own in values)
    grid = [np.array([own[prompt] for prompt in (values[0] if common else own)]) for own in values]

    def resampled_means() -> np.ndarray:
        """[seeds, resamples]."""
        picks = [rng.integers(len(own), size=(SAMPLES, len(own))) for own in grid[: 1 if common else None]]
        return np.stack([own[picks[0 if common else number]].mean(1) for number, own in enumerate(grid)])

    slots = [resampled_means()] * count if common else [resampled_means() for _ in range(count)]
    chosen = rng.integers(count, size=(count, SAMPLES))
    found = np.mean([own[seeds, range(SAMPLES)] for own, seeds in zip(slots, chosen, strict=True)], axis=0)
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    tail = min(np.sum(found <= null), np.sum(found >= null))
    p_value = min(1.0, 2 * (1 + float(tail)) / (1 + SAMPLES))
    return {"mean": float(np.mean([own.mean() for own in grid])), "low": low, "high": high, "p_value": p_value}


def variance_components(values: SeedValues) -> tuple[float, float]:
    """Variance of the seeds' true means, and of prompts within a seed; two seeds at least, each with its own prompts.

    The first is the variance of the seeds' means less what their prompts explain, Σ s²/P / n, and at least 0 (one-way
    random effects: Searle, Casella and McCulloch 1992, "Variance Components").
    """
    variances = [np.var(list(own.values()), ddof=1) for own in values]
    between = np.var([np.mean(list(own.values())) for own in values], ddof=1)
    explained = np.mean([within / len(own) for within, own in zip(variances, values, strict=True)])
    return max(0.0, float(between - explained)), float(np.mean(variances))


def detectable_difference(seed_variance: float, prompt_variance: float, *, seeds: int, prompts: int) -> float:
    """Smallest difference that a two-sided t-test over two or more seeds at 5 % sees with 80 % power.

    (t₀.₉₇₅ + t₀.₈) · √(σ²_seed/S + σ²_prompt/(S·P)), Student's t with S − 1 degrees of freedom: an approximation of
    the noncentral t (Bloom 1995, "Minimum detectable effects", Evaluation Review 19). Each seed has its own prompts.
    """
    quantiles = scipy.stats.t.ppf([(1 + LEVEL) / 2, POWER], seeds - 1).sum()
    return float(quantiles) * math.sqrt(seed_variance / seeds + prompt_variance / (seeds * prompts))
