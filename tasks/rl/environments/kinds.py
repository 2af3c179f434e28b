"""The environments that `environment.kind` of params.yaml can name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tasks.rl.environments.dialogue import Environment
from tasks.rl.environments.second_try import SecondTry
from tasks.rl.environments.service_bot import ServiceBot

__all__ = ["ENVIRONMENTS"]

ENVIRONMENTS: Mapping[str, Callable[[], Environment]] = {"reasoning_gym": SecondTry, "service_bot": ServiceBot}
"""Kind → how to make one. A new environment is one more line here, and in `EnvironmentParams.kind`."""
