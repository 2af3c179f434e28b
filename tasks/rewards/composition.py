"""The reward of a response: a weighted sum of named components, each of which stays visible by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from tasks.core import ranks
from tasks.core.errors import ConfigError, TrainingError
from tasks.core.schema import Prompt
from tasks.core.sections.reward import RewardParams
from tasks.rewards.learned import RewardModel
from tasks.rewards.rules import RULES, RewardFunction

__all__ = ["GIVEN", "LEARNED", "CompositeReward", "Measuring", "Reward", "build_reward", "load_reward"]

LEARNED = "learned"
"""The component that the trained reward model computes; every other one is a rule."""

GIVEN = frozenset({"environment"})
"""Components that come with the responses, as what an environment paid for a conversation does."""

SHOWN = 200
"""Characters of a text that an error message shows."""


@dataclass(frozen=True)
class Reward:
    """What B responses are worth.

    Attributes:
        total: [B] float32, the weighted sum.
        components: name → [B] float32, before weighting.
        measures: name → [B] float32, what components noticed about the responses; reported, never paid.
    """

    total: Tensor
    components: dict[str, Tensor]
    measures: dict[str, Tensor] = field(default_factory=dict)

    def of_all_ranks(self) -> Reward:
        """That of every rank's responses."""
        components = {name: ranks.gathered(values) for name, values in self.components.items()}
        measures = {name: ranks.gathered(values) for name, values in self.measures.items()}
        return Reward(ranks.gathered(self.total), components, measures)


@runtime_checkable
class Measuring(Protocol):
    """A component that notices more about responses than what they are worth."""

    def measured(self, prompts: list[str], responses: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Values [B], and name → [B] what else was measured in the same pass."""


Component: TypeAlias = RewardFunction | Measuring


class CompositeReward:
    """Σ weight · component, computed in the order of `weights`; a component of weight 0 is computed and reported."""

    def __init__(self, components: Mapping[str, Component], weights: Mapping[str, float]) -> None:
        """Pair each weight with its component.

        Raises:
            ConfigError: there is no weight, or a weight names no component, or a component has no weight.
        """
        if not weights or set(components) != set(weights) - GIVEN:
            raise ConfigError(
                f"reward.weights must name each component once: components {sorted(components)}, "
                f"weights {sorted(weights)}"
            )
        self._components = dict(components)
        self._weights = dict(weights)

    @property
    def weights(self) -> Mapping[str, float]:
        """Component → weight."""
        return self._weights

    def __call__(
        self, prompts: list[str], responses: list[str], given: Mapping[str, Component] | None = None
    ) -> Reward:
        """Score B responses, each to the prompt at its place.

        Args:
            given: those of `GIVEN` that have a weight, for these responses.

        Raises:
            TrainingError: a component gives a value that is not finite, or not one value per response.
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
        total = torch.zeros(len(responses))
        for name, own in values.items():
            total = total + self._weights[name] * own
        return Reward(total, values, measures)


def load_reward(
    params: RewardParams, prompts: Sequence[Prompt], *, base_model: Path, sft: Path, reward_model: Path
) -> CompositeReward:
    """The reward that the `reward` section describes, its reward model loaded only if it has a weight.

    Raises:
        ConfigError: a weight names no known component.
        ModelError: the reward model is needed and its folder is incomplete.
    """
    learned = None
    if LEARNED in params.weights:
        learned = RewardModel.load(
            base_model, sft, reward_model, combine=params.combine, uncertainty_coef=params.uncertainty_coef
        )
    return build_reward(params, prompts, learned)


def build_reward(params: RewardParams, prompts: Sequence[Prompt], learned: Component | None) -> CompositeReward:
    """The reward that the `reward` section describes.

    Args:
        prompts: all that will be asked about; rules learn the right answers from them.
        learned: the reward model as a function of prompts and responses; None where the stage is off.

    Raises:
        ConfigError: a weight names no known component, or the reward model, which is off.
    """
    answers = {row.prompt: row.answer for row in prompts if row.answer is not None}
    components: dict[str, Component] = {}
    for name in params.weights:
        if name in GIVEN:
            continue
        if name != LEARNED and name not in RULES:
            known = ", ".join(sorted([LEARNED, *RULES]))
            raise ConfigError(f"reward.weights.{name}: no such component; known ones: {known}; check the spelling")
        if name == LEARNED:
            if learned is None:
                raise ConfigError(f"reward.weights.{LEARNED}: the stage reward_model is off; remove the weight")
            components[name] = learned
        else:
            components[name] = RULES[name](params, answers)
    return CompositeReward(components, params.weights)


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
