"""Custom rewards: `module:function` of a file in tasks/rewards/custom."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tasks.core.errors import ConfigError
from tasks.rewards.rules.base import Answers, PerSampleRule

if TYPE_CHECKING:
    from tasks.config.rules import CustomRule

__all__ = ["custom_rule"]

PACKAGE = "tasks.rewards.custom"


def custom_rule(options: CustomRule, answers: Answers) -> PerSampleRule:
    """Import the user's function, which is called with the sample and its options.

    Raises:
        ConfigError: its module cannot be imported.
    """
    module, _, name = options.function.partition(":")
    try:
        function: Any = getattr(import_module(f"{PACKAGE}.{module}"), name)
    except Exception as error:
        raise ConfigError(
            f"reward.rules: {options.function!r} cannot be imported: {type(error).__name__}: {error}; see "
            f"tasks/rewards/custom/{module}.py"
        ) from error
    keywords = options.options
    return PerSampleRule(lambda prompt, response: function(prompt, response, answers.get(prompt), **keywords))
