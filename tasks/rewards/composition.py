"""Composite reward: named components, weighted into one number and reported one by one."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tasks.config.base import EXTERNAL_COMPONENTS, LEARNED
from tasks.config.rules import RuleOptions  # noqa: TC001 - at run time, so that defaults of rules are inputs of what scores
from tasks.core import distributed
from tasks.core.errors import ConfigError, TrainingError
from tasks.core.paths import Artifacts
from tasks.core.rows import Prompt
from tasks.rewards.reward_model import RewardModel
from tasks.rewards.rules import get_rule_factory
from tasks.rewards.rules.base import Answers, Component, FaultTolerantRule, PerSampleRule, ScoresWithMetrics

if TYPE_CHECKING:
    from tasks.config.reward import Normaliser, Priority, RewardParams

__all__ = [
    "CompositeReward",
    "RewardBatch",
    "apply_gates",
    "build_reward",
    "interpolate_weight",
    "lexicographic",
    "load_reward",
    "product",
    "rule_component",
    "standardise",
    "weighted_sum",
]

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
                f"[0, 1]; scale it by reward.normalisation.{name}, or choose another composition"
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


MESSAGE_CHARACTERS = 200
"""Characters of a text that an error message shows."""


@dataclass(frozen=True)
class RewardBatch:
    """Rewards of B responses.

    Attributes:
        total: [B] float32, the reward.
        components: name → [B] float32, raw: before scales, weights and gates.
        metrics: name → [B] float32, further metrics of components; reported, not part of the reward.
    """

    total: Tensor
    components: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def gather(self) -> RewardBatch:
        """Gather the rewards of all ranks."""
        components = {name: distributed.all_gather(values) for name, values in self.components.items()}
        metrics = {name: distributed.all_gather(values) for name, values in self.metrics.items()}
        return RewardBatch(distributed.all_gather(self.total), components, metrics)


class CompositeReward:
    """Weighted components; one of weight 0 is computed and reported."""

    def __init__(
        self,
        components: Mapping[str, Component],
        weights: Mapping[str, float],
        *,
        composition: str = "sum",
        priorities: Sequence[Priority] = (),
        gates: Mapping[str, float] | None = None,
        floor: float = 0.0,
        scales: Mapping[str, Normaliser] | None = None,
        weight_schedule: Mapping[str, Mapping[int, float]] | None = None,
    ) -> None:
        """Pair each weight with its component; the other arguments are those of the `reward` section.

        Raises:
            ConfigError: there is no weight, or a weight names no component, or a component has no weight.
        """
        if not weights or set(components) != set(weights) - EXTERNAL_COMPONENTS:
            raise ConfigError(
                f"reward.weights must name each component once: components {sorted(components)}, "
                f"weights {sorted(weights)}"
            )
        self._components = dict(components)
        self._weights = dict(weights)
        self._composition = composition
        self._priorities = [(rank.component, rank.threshold) for rank in priorities]
        self._gates, self._floor = dict(gates or {}), floor
        self._scales, self._weight_schedule = dict(scales or {}), dict(weight_schedule or {})
        self._evaluation_stats: dict[str, tuple[float, float]] = {}

    @property
    def weights(self) -> Mapping[str, float]:
        """Component → weight, at the end of its schedule."""
        return self._weights

    def weights_at(self, update: int | None) -> Mapping[str, float]:
        """Component → weight in an update, from 1; None: `weights`."""
        if update is None:
            return self._weights
        return self._weights | {
            name: interpolate_weight(points, update) for name, points in self._weight_schedule.items()
        }

    def marginal_weights(self, update: int) -> Mapping[str, float]:
        """Marginal weight of each raw component in the total; empty where it is not constant."""
        if self._composition != "sum" or any(scale.by == "batch" for scale in self._scales.values()):
            return {}
        return {
            name: weight / (self._scales[name].std if name in self._scales else 1.0)
            for name, weight in self.weights_at(update).items()
        }

    def __call__(
        self,
        prompts: list[str],
        responses: list[str],
        update: int | None = None,
        external: Mapping[str, Component] | None = None,
    ) -> RewardBatch:
        """Score B responses, one per prompt.

        Args:
            update: of training, from 1; None outside training.
            external: those of `EXTERNAL_COMPONENTS` that have a weight, for these responses.

        Raises:
            TrainingError: a component gives a value that is not finite, or not one value per response, or fails on
                most responses.
        """
        if len(prompts) != len(responses):
            raise TrainingError(f"reward: {len(prompts)} prompts for {len(responses)} responses; pass one per response")
        values: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        components = self._components | dict(external or {})
        for name in self._weights:
            value, component_metrics = _call_component(components[name], prompts, responses)
            values[name] = _validate_scores(name, value, prompts, responses)
            metrics |= component_metrics
        return RewardBatch(self._total(values, update), values, metrics)

    def _total(self, values: Mapping[str, Tensor], update: int | None) -> Tensor:
        """Total [B] of the component values."""
        scaled = {name: self._normalise(name, value, update) for name, value in values.items()}
        weights = self.weights_at(update)
        if self._composition == "product":
            total = product(scaled, weights)
        elif self._composition == "lexicographic":
            total = lexicographic(scaled, weights, values, self._priorities)
        else:
            total = weighted_sum(scaled, weights)
        return apply_gates(total, values, self._gates, self._floor)

    def _normalise(self, name: str, values: Tensor, update: int | None) -> Tensor:
        if name not in self._scales:
            return values
        scale = self._scales[name]
        if scale.by == "fixed":
            return standardise(values, scale.mean, scale.std)
        if update is not None:
            return standardise(values, *_mean_and_std(values))
        if name not in self._evaluation_stats:
            self._evaluation_stats[name] = _mean_and_std(values)
        return standardise(values, *self._evaluation_stats[name])


def load_reward(params: RewardParams, prompts: Sequence[Prompt], artifacts: Artifacts) -> CompositeReward:
    """Load the reward that the `reward` section describes; the reward model only if it has a weight.

    Raises:
        ConfigError: a rule's package is not installed, or a user's module cannot be imported.
        ModelError: the reward model is needed and its folder is incomplete.
    """
    learned = None
    if LEARNED in params.weights:
        learned = RewardModel.load(
            artifacts.base_model,
            artifacts.sft,
            artifacts.reward_model,
            ensemble_reduction=params.ensemble_reduction,
            uncertainty_coef=params.uncertainty_coef,
        )
    return build_reward(params, prompts, learned)


def build_reward(params: RewardParams, prompts: Sequence[Prompt], learned: Component | None) -> CompositeReward:
    """The reward that the `reward` section describes.

    Args:
        prompts: all that will be scored; rules read the right answers from them.
        learned: the reward model as a function of prompts and responses; None where the stage is off.

    Raises:
        ConfigError: a weight names the reward model, which is off, or a rule's package is not installed.
    """
    answers = {row.prompt: row.answer for row in prompts if row.answer is not None}
    if LEARNED in params.weights and learned is None:
        raise ConfigError(f"reward.weights.{LEARNED}: the stage reward_model is off; remove the weight")
    components = {LEARNED: learned} if learned is not None and LEARNED in params.weights else {}
    components |= {
        name: rule_component(name, params.rules[name], answers)
        for name in params.weights
        if name != LEARNED and name not in EXTERNAL_COMPONENTS
    }
    return CompositeReward(
        components,
        params.weights,
        composition=params.composition,
        priorities=params.priorities,
        gates=params.gates,
        floor=params.floor,
        scales=params.normalisation,
        weight_schedule=params.weight_schedule,
    )


def rule_component(name: str, options: RuleOptions, answers: Answers) -> Component:
    """The rule of a component; one that looks at single samples has its failures counted under the component's name."""
    rule = get_rule_factory(options.function)(options, answers)
    return FaultTolerantRule(name, rule.score, options.floor) if isinstance(rule, PerSampleRule) else rule


def _mean_and_std(values: Tensor) -> tuple[float, float]:
    """Mean and standard deviation over the responses of all ranks."""
    gathered = distributed.all_gather(values)
    return gathered.mean().item(), gathered.std(correction=0).item()


def _call_component(
    component: Component, prompts: list[str], responses: list[str]
) -> tuple[Sequence[float] | Tensor, dict[str, Tensor]]:
    """Call a component: its values and its metrics."""
    if isinstance(component, ScoresWithMetrics):
        return component.score_with_metrics(prompts, responses)
    return component(prompts, responses), {}


def _validate_scores(name: str, value: Sequence[float] | Tensor, prompts: list[str], responses: list[str]) -> Tensor:
    """Validate a component's values: [B] float32 on the CPU."""
    tensor = torch.as_tensor(value, dtype=torch.float32).detach().cpu()
    if tensor.shape != (len(responses),):
        raise TrainingError(
            f"reward component {name!r} returned shape {tuple(tensor.shape)} for {len(responses)} responses; "
            "it must return one number per response"
        )
    bad = (~torch.isfinite(tensor)).nonzero().flatten().tolist()
    if bad:
        row = bad[0]
        raise TrainingError(
            f"reward component {name!r} is {tensor[row].item()} ({len(bad)} of {len(responses)} values not finite) for "
            f"prompt {prompts[row][:MESSAGE_CHARACTERS]!r}, response {responses[row][:MESSAGE_CHARACTERS]!r}; a "
            "model that gives such a score "
            "has diverged (retrain it with a lower learning_rate), a rule has a bug"
        )
    return tensor
