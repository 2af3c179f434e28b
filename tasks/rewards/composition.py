"""The reward of a response: named components as one number, each of which stays visible by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tasks.core import ranks
from tasks.core.errors import ConfigError, TrainingError
from tasks.core.schema import Prompt
from tasks.core.sections.reward import EXTERNAL_COMPONENTS, LEARNED, Priority, RewardParams, Normaliser
from tasks.core.sections.rules import RuleOptions
from tasks.rewards.combination import gated, lexicographic, product, standardised, weight_at, weighted_sum
from tasks.rewards.counting import Counted
from tasks.rewards.learned import RewardModel
from tasks.rewards.rules import factory_of
from tasks.rewards.rules.kinds import Answers, Component, EachSample, Measuring

__all__ = ["CompositeReward", "Reward", "build_reward", "load_reward", "rule_component"]

SHOWN = 200
"""Characters of a text that an error message shows."""


@dataclass(frozen=True)
class Reward:
    """What B responses are worth.

    Attributes:
        total: [B] float32, what is paid.
        components: name → [B] float32, as they are: before scales, weights and gates.
        measures: name → [B] float32, what components noticed about the responses; reported, never paid.
    """

    total: Tensor
    components: dict[str, Tensor]
    measures: dict[str, Tensor] = field(default_factory=dict)

    def of_all_ranks(self) -> Reward:
        """That of every rank's responses."""
        components = {name: ranks.all_gather(values) for name, values in self.components.items()}
        measures = {name: ranks.all_gather(values) for name, values in self.measures.items()}
        return Reward(ranks.all_gather(self.total), components, measures)


class CompositeReward:
    """Components and how they become one number; one of weight 0 is computed and reported."""

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
        curriculum: Mapping[str, Mapping[int, float]] | None = None,
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
        self._scales, self._curriculum = dict(scales or {}), dict(curriculum or {})
        self._first: dict[str, tuple[float, float]] = {}

    @property
    def weights(self) -> Mapping[str, float]:
        """Component → weight, where a curriculum ends."""
        return self._weights

    def weights_at(self, update: int | None) -> Mapping[str, float]:
        """Component → weight in an update, from 1; None: `weights`."""
        if update is None:
            return self._weights
        return self._weights | {name: weight_at(points, update) for name, points in self._curriculum.items()}

    def slopes_at(self, update: int) -> Mapping[str, float]:
        """What one more of each component, as it is reported, adds to the total; none where that is no constant."""
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
        given: Mapping[str, Component] | None = None,
    ) -> Reward:
        """Score B responses, each to the prompt at its place.

        Args:
            update: of the training that asks, from 1; None outside training.
            given: those of `EXTERNAL_COMPONENTS` that have a weight, for these responses.

        Raises:
            TrainingError: a component gives a value that is not finite, or not one value per response, or fails on
                most responses.
        """
        if len(prompts) != len(responses):
            raise TrainingError(f"reward: {len(prompts)} prompts for {len(responses)} responses; pass one per response")
        values: dict[str, Tensor] = {}
        measures: dict[str, Tensor] = {}
        components = self._components | dict(given or {})
        for name in self._weights:
            value, noticed = _asked(components[name], prompts, responses)
            values[name] = _checked(name, value, prompts, responses)
            measures |= noticed
        return Reward(self._total(values, update), values, measures)

    def _total(self, values: Mapping[str, Tensor], update: int | None) -> Tensor:
        """[B] from what the components gave."""
        scaled = {name: self._scaled(name, own, update) for name, own in values.items()}
        weights = self.weights_at(update)
        if self._composition == "product":
            total = product(scaled, weights)
        elif self._composition == "lexicographic":
            total = lexicographic(scaled, weights, values, self._priorities)
        else:
            total = weighted_sum(scaled, weights)
        return gated(total, values, self._gates, self._floor)

    def _scaled(self, name: str, values: Tensor, update: int | None) -> Tensor:
        if name not in self._scales:
            return values
        scale = self._scales[name]
        if scale.by == "fixed":
            return standardised(values, scale.mean, scale.std)
        if update is not None:
            return standardised(values, *_mean_and_std(values))
        if name not in self._first:
            self._first[name] = _mean_and_std(values)
        return standardised(values, *self._first[name])


def load_reward(
    params: RewardParams, prompts: Sequence[Prompt], *, base_model: Path, sft: Path, reward_model: Path
) -> CompositeReward:
    """The reward that the `reward` section describes, its reward model loaded only if it has a weight.

    Raises:
        ConfigError: a rule's package is not installed, or a user's module cannot be imported.
        ModelError: the reward model is needed and its folder is incomplete.
    """
    learned = None
    if LEARNED in params.weights:
        learned = RewardModel.load(
            base_model, sft, reward_model, combine=params.ensemble_reduction, uncertainty_coef=params.uncertainty_coef
        )
    return build_reward(params, prompts, learned)


def build_reward(params: RewardParams, prompts: Sequence[Prompt], learned: Component | None) -> CompositeReward:
    """The reward that the `reward` section describes.

    Args:
        prompts: all that will be asked about; rules learn the right answers from them.
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
        curriculum=params.weight_schedule,
    )


def rule_component(name: str, options: RuleOptions, answers: Answers) -> Component:
    """The rule of a component; one that looks at single samples has its failures counted under the component's name."""
    made = factory_of(options.function)(options, answers)
    return Counted(name, made.score, options.floor) if isinstance(made, EachSample) else made


def _mean_and_std(values: Tensor) -> tuple[float, float]:
    """Over every rank's responses."""
    whole = ranks.all_gather(values)
    return whole.mean().item(), whole.std(correction=0).item()


def _asked(
    component: Component, prompts: list[str], responses: list[str]
) -> tuple[Sequence[float] | Tensor, dict[str, Tensor]]:
    """The component's values, and what it has measured beside them."""
    if isinstance(component, Measuring):
        return component.measured(prompts, responses)
    return component(prompts, responses), {}


def _checked(name: str, value: Sequence[float] | Tensor, prompts: list[str], responses: list[str]) -> Tensor:
    """The component's values as [B] float32 on the CPU."""
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
            f"prompt {prompts[row][:SHOWN]!r}, response {responses[row][:SHOWN]!r}; a model that gives such a score "
            "has diverged (retrain it with a lower learning_rate), a rule has a bug"
        )
    return tensor
