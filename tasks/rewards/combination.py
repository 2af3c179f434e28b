"""Compositions of reward components: pure functions of tensors.

B responses; a mapping names components in the order in which they are added.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tasks.core.errors import TrainingError

__all__ = ["apply_gates", "lexicographic", "product", "standardise", "interpolate_weight", "weighted_sum"]

Values = Mapping[str, Tensor]
Weights = Mapping[str, float]

MIN_STD = 1e-6


def weighted_sum(values: Values, weights: Weights) -> Tensor:
    """Σ weight · value, [B]."""
    total = torch.zeros(len(next(iter(values.values()))))
    for name, value in values.items():
        total = total + weights[name] * value
    return total


def product(values: Values, weights: Weights) -> Tensor:
    """Π value ^ weight, [B], for values in [0, 1]: one that is 0 and has a weight makes the product 0.

    A component of weight 0 is reported alone, so its values may be any.

    Raises:
        TrainingError: a value lies outside [0, 1], where a power means nothing.
    """
    total = torch.ones(len(next(iter(values.values()))))
    for name, value in values.items():
        if weights[name] == 0:
            continue
        outside = value[(value < 0) | (value > 1)]
        if len(outside):
            raise TrainingError(
                f"reward component {name!r} is {outside[0].item():g}, and reward.composition: product needs values in "
                f"[0, 1]; scale it by reward.normalise.{name}, or choose another composition"
            )
        total = total * value ** weights[name]
    return total


def lexicographic(values: Values, weights: Weights, raw: Values, priorities: Sequence[tuple[str, float]]) -> Tensor:
    """Σ weight · value · [every component before it in the priorities reaches its threshold], [B].

    Those that are not among the priorities come last, together. For the order to pay, what comes later
    should not be negative: reaching a threshold would cost.

    Args:
        raw: values that are compared with the thresholds.
    """
    passed = torch.ones(len(next(iter(values.values()))))
    ranked: dict[str, Tensor] = {}
    for name, threshold in priorities:
        ranked[name] = values[name] * passed
        passed = passed * (raw[name] >= threshold).float()
    rest = {name: value * passed for name, value in values.items() if name not in ranked}
    return weighted_sum({name: (ranked | rest)[name] for name in values}, weights)


def apply_gates(total: Tensor, raw: Values, gates: Mapping[str, float], floor: float) -> Tensor:
    """The total [B], but at most `floor` where a component is below its gate.

    At most: a floor of 0 would else raise the reward of responses below it.
    """
    for name, threshold in gates.items():
        total = torch.where(raw[name] >= threshold, total, total.clamp(max=floor))
    return total


def standardise(values: Tensor, mean: float, std: float) -> Tensor:
    """(value − mean) / std, [B]; 0 where nothing varies."""
    return (values - mean) / std if std > MIN_STD else torch.zeros_like(values)


def interpolate_weight(points: Mapping[int, float], update: int) -> float:
    """The weight in an update, linear between the points and flat before the first and after the last."""
    updates = list(points)
    index = bisect(updates, update)
    if index in (0, len(updates)):
        return points[updates[max(0, index - 1)]]
    earlier, later = updates[index - 1], updates[index]
    fraction = (update - earlier) / (later - earlier)
    return points[earlier] + fraction * (points[later] - points[earlier])
