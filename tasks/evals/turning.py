"""Sentences about the peaks of the fitted over-optimisation curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tasks.evals.overoptimisation import curve
from tasks.evals.verdict import DISPLAY_NAMES, join_and, format_percent

__all__ = ["turning_point"]


def turning_point(fits: Mapping[str, Any], points: Sequence[Mapping[str, str]]) -> str:
    """Describe whether the gold judge's fitted curves peak within the measured distances; "" without curves.

    Args:
        fits: method → judge → fit, as `tasks.evals.overoptimisation` writes them.
        points: the rows of that curve.
    """
    peaked, rising, flat = [], [], []
    for method, own in fits.items():
        fit = own["gold"]
        max_distance = max(float(row["distance"]) for row in points if row["method"] == method)
        if fit["peak"] is not None and fit["peak"] < max_distance:
            peaked.append(_describe_peak(method, fit, max_distance))
        elif _fitted_gain(fit, max_distance) > 0:
            rising.append((f"{DISPLAY_NAMES.get(method, method)} ({max_distance:.1f})", fit["peak_fraction"]))
        else:
            flat.append(DISPLAY_NAMES.get(method, method))
    return " ".join([*peaked, *_rising_sentence(rising), *_no_gain_sentence(flat)])


def _fitted_gain(fit: Mapping[str, Any], distance: float) -> float:
    return float(curve(fit["form"], fit["alpha"]["mean"], fit["beta"]["mean"], np.array([distance]))[0])


def _describe_peak(method: str, fit: Mapping[str, Any], max_distance: float) -> str:
    """Describe a peak; it is certain if the whole interval of β is above 0, since only then the curve bends down."""
    beta = fit["beta"]
    certain = beta["low"] > 0
    return (
        f"{'Over-optimised' if certain else 'Perhaps over-optimised'}: by the gold judge, {DISPLAY_NAMES.get(method, method)} is "
        f"best at √KL {fit['peak']:.1f} and gets worse from there to {max_distance:.1f}, the farthest measured "
        f"(β {_format_number(beta['mean'])}, 95% interval {_format_number(beta['low'])} to {_format_number(beta['high'])}"
        f"{'' if certain else ', which holds 0'}; {format_percent(fit['peak_fraction'])}% of resamples peak within it)."
    )


def _rising_sentence(methods: Sequence[tuple[str, float]]) -> list[str]:
    if not methods:
        return []
    most = max(share for _, share in methods)
    share = f"at most {math.ceil(100 * most)}%" if most else "none"
    return [
        f"No turning point within what was measured: by the gold judge's fitted curves, more reward was still better "
        f"at the farthest √KL of {join_and([name for name, _ in methods])}; {share} of the resamples peak before."
    ]


def _no_gain_sentence(methods: Sequence[str]) -> list[str]:
    return [f"By the gold judge's fitted curve, {join_and(methods)} ended no better than SFT."] if methods else []


def _format_number(value: float) -> str:
    return f"{value:z.2f}".replace("-", "−")
