"""Types of rules: a function of one sample, of a batch, or of a batch with metrics; the user's own among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from tasks.core.custom import load_custom
from tasks.core.errors import ConfigError, RLHFError, TrainingError
from tasks.core.terminal import print_line

if TYPE_CHECKING:
    from tasks.config.rules import CustomRule

__all__ = [
    "Answers", "Component", "FaultTolerantRule", "PerSampleRule", "RewardFunction", "RuleFactory", "ScoresWithMetrics",
    "custom_rule", "import_extra", "quote", "response_rule",
]  # fmt: skip

RewardFunction: TypeAlias = Callable[[list[str], list[str]], Sequence[float] | Tensor]
"""(prompts [B], responses [B]) → one value per response [B]; `prompt + response` is the whole text."""

Answers: TypeAlias = Mapping[str, str]
"""Prompt → its right answer, for the prompts that have one."""


@runtime_checkable
class ScoresWithMetrics(Protocol):
    """A component that returns metrics beside its values."""

    def score_with_metrics(self, prompts: list[str], responses: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Values [B], and name → [B] metrics of the same pass."""


Component: TypeAlias = RewardFunction | ScoresWithMetrics


@dataclass(frozen=True)
class PerSampleRule:
    """A rule that scores one sample at a time: (prompt, response) → value. A failure costs one sample."""

    score: Callable[[str, str], float]


RuleFactory: TypeAlias = Callable[[Any, Answers], PerSampleRule | Component]
"""Makes a rule from its options, checked (`tasks.config.rules`), and the right answers of the prompts."""


def response_rule(function: Callable[..., float], *names: str) -> RuleFactory:
    """Make the factory of a rule of the response alone; the named options are its keyword arguments."""

    def make(options: Any, _answers: Answers) -> PerSampleRule:
        arguments = {name: getattr(options, name) for name in names}
        return PerSampleRule(lambda _prompt, response: function(response, **arguments))

    return make


def custom_rule(options: CustomRule, answers: Answers) -> PerSampleRule:
    """The user's function, which is called with the sample and its options; see `load_custom`."""
    function = load_custom(options.kind, options.function)
    return PerSampleRule(lambda prompt, response: function(prompt, response, answers.get(prompt), **options.options))


def import_extra(module: str, rule: str, extra: str = "rules") -> Any:
    """Import a package that only some rules need, and which an extra of the project brings.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"the rule {rule!r} needs the package of the module {module!r} ({error}): `pip install -e '.[{extra}]'`"
        ) from error


MIN_BATCH = 8  # the smallest in which a majority of failures is an error


def quote(prompt: str, response: str) -> str:
    """The beginnings of a prompt and its response, for messages."""
    return f"prompt {prompt[:200]!r}, response {response[:200]!r}"


class FaultTolerantRule:
    """Applies a rule to a batch; where it raises or is not finite, the sample gets the floor and is counted.

    The first failure is printed. An error of the project's own (no right answer is known, say) stays an error.
    """

    def __init__(self, name: str, score: Callable[[str, str], float], floor: float) -> None:
        self._name, self._score, self._floor, self._warned = name, score, floor, False

    def score_with_metrics(self, prompts: list[str], responses: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Values [B], and `failures/<component>` [B]: 1 for each response on which it failed.

        Raises:
            TrainingError: it fails on more than half of a batch of at least `MIN_BATCH`.
        """
        samples = list(zip(prompts, responses, strict=True))
        scored = [self._safe_score(*sample) for sample in samples]
        failures = [f"{quote(*sample)}: {why}" for sample, (_, why) in zip(samples, scored, strict=True) if why]
        metric = f"failures/{self._name}"
        if len(responses) >= MIN_BATCH and len(failures) > len(responses) / 2:
            raise TrainingError(
                f"reward component {self._name!r} fails on {len(failures)} of {len(responses)} responses, which is a "
                f"bug and no accident; the first: {failures[0]}"
            )
        if failures and not self._warned:
            self._warned = True
            print_line(
                f"reward: warning: component {self._name!r} failed on {failures[0]}; it earns {self._floor:g}; further "
                f"failures are counted in {metric}"
            )
        failed = torch.tensor([float(bool(problem)) for _, problem in scored])
        return torch.tensor([value for value, _ in scored], dtype=torch.float32), {metric: failed}

    def _safe_score(self, prompt: str, response: str) -> tuple[float, str]:
        """Value, and the failure, if any."""
        try:
            value = float(self._score(prompt, response))
        except RLHFError:
            raise
        except Exception as error:
            return self._floor, f"{type(error).__name__}: {error}"
        return (value, "") if math.isfinite(value) else (self._floor, f"the value is {value}")
