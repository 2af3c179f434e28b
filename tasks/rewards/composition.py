"""Composite reward: named components, weighted into one number and reported one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tasks.config.base import EXTERNAL_COMPONENTS, LEARNED
from tasks.config.rules import RuleOptions  # noqa: TC001 - at run time, so that defaults of rules are inputs of what scores
from tasks.core import distributed
from tasks.core.errors import ConfigError, TrainingError
from tasks.core.paths import Artifacts
from tasks.core.rows import Prompt
from tasks.rewards.reward_model import RewardModel
from tasks.rewards.rules import RULES, custom_rule
from tasks.rewards.rules.base import Answers, Component, FaultTolerantRule, PerSampleRule, ScoresWithMetrics, quote

if TYPE_CHECKING:
    from tasks.config.reward import Normaliser, Priority, RewardParams

__all__ = ["CompositeReward", "RewardBatch", "build_reward", "load_reward", "rule_component"]

Values = Mapping[str, Tensor]
Weights = Mapping[str, float]

MIN_STD = 1e-6


def product(values: Values, weights: Weights) -> Tensor:
    """Π value ^ weight, [B], for values in [0, 1]; those of a component of weight 0 may be any.

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


def weighted_sum(values: Values, weights: Weights, raw: Values, priorities: Sequence[Priority]) -> Tensor:
    """Σ weight · value · [every component before it in the priorities reaches its threshold of `raw` values], [B].

    Those that are not among the priorities come last, together. What comes later should not be negative: reaching a
    threshold would cost.
    """
    total, passed = torch.zeros(len(next(iter(values.values())))), torch.ones(len(next(iter(values.values()))))
    before: dict[str, Tensor] = {}
    for rank in priorities:
        before[rank.component] = passed
        passed = passed * (raw[rank.component] >= rank.threshold).float()
    for name, value in values.items():
        total = total + weights[name] * (value * before.get(name, passed))
    return total


@dataclass(frozen=True)
class RewardBatch:
    """Rewards of B responses, all float32."""

    total: Tensor  # [B]
    components: dict[str, Tensor]  # name → [B], raw: before scales, weights and gates
    metrics: dict[str, Tensor] = field(default_factory=dict)  # name → [B], of components; not part of the reward

    def gather(self) -> RewardBatch:
        """Gather the rewards of all ranks."""
        components = {name: distributed.all_gather(values) for name, values in self.components.items()}
        metrics = {name: distributed.all_gather(values) for name, values in self.metrics.items()}
        return RewardBatch(distributed.all_gather(self.total), components, metrics)


@dataclass
class CompositeReward:
    """Weighted components; one of weight 0 is computed and reported. The fields are those of the `reward` section.

    Raises:
        ConfigError: there is no weight, or a weight names no component, or a component has no weight.
    """

    components: Mapping[str, Component]
    weights: Weights
    composition: str = "sum"
    priorities: Sequence[Priority] = ()
    gates: Mapping[str, float] = field(default_factory=dict)
    floor: float = 0.0
    scales: Mapping[str, Normaliser] = field(default_factory=dict)
    weight_schedule: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    _evaluation_stats: dict[str, tuple[float, float]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not self.weights or set(self.components) != set(self.weights) - EXTERNAL_COMPONENTS:
            raise ConfigError(
                f"reward.weights must name each component once: components {sorted(self.components)}, "
                f"weights {sorted(self.weights)}"
            )

    def weights_at(self, update: int | None) -> Mapping[str, float]:
        """Component → weight in an update, from 1; outside training, None: `weights`, the end of the schedule."""
        if update is None:
            return self.weights
        schedule = {name: (list(points), list(points.values())) for name, points in self.weight_schedule.items()}
        return {**self.weights, **{name: float(np.interp(update, *points)) for name, points in schedule.items()}}

    def marginal_weights(self, update: int) -> Mapping[str, float]:
        """Marginal weight of each raw component in the total; empty where it is not constant."""
        if self.composition != "sum" or any(scale.by == "batch" for scale in self.scales.values()):
            return {}
        return {
            name: weight / (self.scales[name].std if name in self.scales else 1.0)
            for name, weight in self.weights_at(update).items()
        }

    def __call__(
        self,
        prompts: list[str],
        responses: list[str],
        update: int | None = None,
        external: Mapping[str, Component] | None = None,
    ) -> RewardBatch:
        """Score B responses, one per prompt; `external` are those of `EXTERNAL_COMPONENTS` that have a weight.

        Raises:
            TrainingError: a component gives a value that is not finite, not one per response, or fails on most.
        """
        if len(prompts) != len(responses):
            raise TrainingError(f"reward: {len(prompts)} prompts for {len(responses)} responses; pass one per response")
        values: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        components = {**self.components, **(external or {})}
        for name in self.weights:
            values[name], own_metrics = _call_component(name, components[name], prompts, responses)
            metrics |= own_metrics
        return RewardBatch(self._total(values, update), values, metrics)

    def _total(self, values: Values, update: int | None) -> Tensor:
        """The composition, [B]; at most `floor` where a component is below its gate: no gate raises a reward."""
        scaled = {name: self._normalise(name, value, update) for name, value in values.items()}
        weights = self.weights_at(update)
        is_product = self.composition == "product"
        total = product(scaled, weights) if is_product else weighted_sum(scaled, weights, values, self.priorities)
        for name, threshold in self.gates.items():
            total = torch.where(values[name] >= threshold, total, total.clamp(max=self.floor))
        return total

    def _normalise(self, name: str, values: Tensor, update: int | None) -> Tensor:
        """(value − mean) / std, [B]; 0 where nothing varies."""
        if name not in self.scales:
            return values
        mean, std = self._mean_and_std(name, values, update)
        return (values - mean) / std if std > MIN_STD else torch.zeros_like(values)

    def _mean_and_std(self, name: str, values: Tensor, update: int | None) -> tuple[float, float]:
        scale = self.scales[name]
        if scale.by == "fixed":
            return scale.mean, scale.std
        if update is None and name in self._evaluation_stats:
            return self._evaluation_stats[name]
        gathered = distributed.all_gather(values)
        stats = gathered.mean().item(), gathered.std(correction=0).item()
        if update is None:
            self._evaluation_stats[name] = stats
        return stats


def load_reward(params: RewardParams, prompts: Sequence[Prompt], artifacts: Artifacts) -> CompositeReward:
    """Load the reward that the `reward` section describes; the reward model only if it has a weight."""
    learned = None
    if LEARNED in params.weights:
        folders = artifacts.base_model, artifacts.sft, artifacts.reward_model
        learned = RewardModel.load(*folders, params.ensemble_reduction, params.uncertainty_coef)
    return build_reward(params, prompts, learned)


def build_reward(params: RewardParams, prompts: Sequence[Prompt], learned: Component | None) -> CompositeReward:
    """The reward that the `reward` section describes; rules read the right answers from `prompts`, all to be scored.

    Raises:
        ConfigError: a weight names the reward model, which is off, or a rule's package is not installed.
    """
    answers = {row.prompt: row.answer for row in prompts if row.answer is not None}
    if LEARNED in params.weights and learned is None:
        raise ConfigError(f"reward.weights.{LEARNED}: the stage reward_model is off; remove the weight")
    components = {
        name: learned if name == LEARNED and learned else rule_component(name, params.rules[name], answers)
        for name in params.weights
        if name not in EXTERNAL_COMPONENTS
    }
    return CompositeReward(
        components, params.weights, params.composition, params.priorities, params.gates, params.floor,
        scales=params.normalisation, weight_schedule=params.weight_schedule,
    )  # fmt: skip


def rule_component(name: str, options: RuleOptions, answers: Answers) -> Component:
    """The rule of a component; failures of one that scores single samples count under the component's name."""
    rule = RULES.get(options.function, custom_rule)(options, answers)
    return FaultTolerantRule(name, rule.score, options.floor) if isinstance(rule, PerSampleRule) else rule


def _call_component(
    name: str, component: Component, prompts: list[str], responses: list[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Values of a component, [B] float32 on the CPU, and its metrics."""
    value: Sequence[float] | Tensor
    if isinstance(component, ScoresWithMetrics):
        value, metrics = component.score_with_metrics(prompts, responses)
    else:
        value, metrics = component(prompts, responses), {}
    tensor = torch.as_tensor(value, dtype=torch.float32).detach().cpu()
    if tensor.shape != (len(responses),):
        raise TrainingError(
            f"reward component {name!r} returned shape {tuple(tensor.shape)} for {len(responses)} responses; "
            "it must return one number per response"
        )
    if bad := (~torch.isfinite(tensor)).nonzero().flatten().tolist():
        row = bad[0]
        raise TrainingError(
            f"reward component {name!r} is {tensor[row].item()} ({len(bad)} of {len(responses)} values not finite) for "
            f"{quote(prompts[row], responses[row])}; a model that gives such a score has diverged (retrain it with a "
            "lower learning_rate), a rule has a bug"
        )
    return tensor, metrics
