"""The environments that `environment.kind` of params.yaml can name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tasks.rl.environments.base import Environment
from tasks.rl.environments.retry import RetryEnvironment
from tasks.rl.environments.service_bot import BookingUser

__all__ = ["ENVIRONMENTS"]

ENVIRONMENTS: Mapping[str, Callable[[], Environment]] = {"reasoning_gym": RetryEnvironment, "service_bot": BookingUser}
"""Kind → factory. A new environment is one more line here, and in `EnvironmentParams.kind`."""
