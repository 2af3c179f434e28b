"""Types of rules: a function of one sample, of a batch, or of a batch with metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from tasks.core.errors import ConfigError

__all__ = [
    "Answers",
    "Component",
    "PerSampleRule",
    "ScoresWithMetrics",
    "RewardFunction",
    "RuleFactory",
    "response_rule",
    "import_extra",
]

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
"""Makes a rule from its options, checked (`tasks.core.sections.rules`), and the right answers of the prompts."""


def response_rule(function: Callable[..., float], *names: str) -> RuleFactory:
    """Make the factory of a rule of the response alone; the named options are its keyword arguments."""

    def make(options: Any, _answers: Answers) -> PerSampleRule:
        arguments = {name: getattr(options, name) for name in names}
        return PerSampleRule(lambda _prompt, response: function(response, **arguments))

    return make


def import_extra(module: str, rule: str) -> Any:
    """Import a package that only some rules need.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"the rule {rule!r} needs the package of the module {module!r} ({error}): `pip install -e '.[rules]'`"
        ) from error
