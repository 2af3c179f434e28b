"""Where more of the proxy stops being better: what the over-optimisation curves say, in a sentence or two."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tasks.evals.overoptimisation import curve
from tasks.evals.verdict import NAMES, listed, percent

__all__ = ["turning_point"]


def turning_point(fits: Mapping[str, Any], points: Sequence[Mapping[str, str]]) -> str:
    """Whether the gold judge's fitted curves turn down within the distances that were measured; "" without curves.

    Args:
        fits: method → judge → fit, as `tasks.evals.overoptimisation` writes them.
        points: the rows of that curve.
    """
    turned, rising, flat = [], [], []
    for method, own in fits.items():
        fit = own["gold"]
        reach = max(float(row["distance"]) for row in points if row["method"] == method)
        if fit["peak"] is not None and fit["peak"] < reach:
            turned.append(_turn(method, fit, reach))
        elif _value(fit, reach) > 0:
            rising.append((f"{NAMES.get(method, method)} ({reach:.1f})", fit["peak_share"]))
        else:
            flat.append(NAMES.get(method, method))
    return " ".join([*turned, *_rising(rising), *_flat(flat)])


def _value(fit: Mapping[str, Any], distance: float) -> float:
    return float(curve(fit["form"], fit["alpha"]["mean"], fit["beta"]["mean"], np.array([distance]))[0])


def _turn(method: str, fit: Mapping[str, Any], reach: float) -> str:
    """Sure where the whole interval of β is above 0, since the curve bends down only there."""
    beta = fit["beta"]
    sure = beta["low"] > 0
    return (
        f"{'Over-optimised' if sure else 'Perhaps over-optimised'}: by the gold judge, {NAMES.get(method, method)} is "
        f"best at √KL {fit['peak']:.1f} and gets worse from there to {reach:.1f}, the farthest measured "
        f"(β {_number(beta['mean'])}, 95% interval {_number(beta['low'])} to {_number(beta['high'])}"
        f"{'' if sure else ', which holds 0'}; {percent(fit['peak_share'])}% of resamples peak within it)."
    )


def _rising(methods: Sequence[tuple[str, float]]) -> list[str]:
    if not methods:
        return []
    most = max(share for _, share in methods)
    share = f"at most {math.ceil(100 * most)}%" if most else "none"
    return [
        f"No turning point within what was measured: by the gold judge's fitted curves, more reward was still better "
        f"at the farthest √KL of {listed([name for name, _ in methods])}; {share} of the resamples peak before."
    ]


def _flat(methods: Sequence[str]) -> list[str]:
    return [f"By the gold judge's fitted curve, {listed(methods)} ended no better than SFT."] if methods else []


def _number(value: float) -> str:
    return f"{value:z.2f}".replace("-", "−")
