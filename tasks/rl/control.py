"""Controllers of β, the KL coefficient. β is state, so every checkpoint holds it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from tasks.core.errors import ConfigError, TrainingError

__all__ = ["AdaptiveKL", "FixedKL", "KLController"]

MAX_ERROR = 0.2  # openai/lm-human-preferences, train_policy.py::AdaptiveKLController


class KLController(Protocol):
    """Interface of a controller: the current β, updated with each batch's KL."""

    kl_coef: float

    def update(self, kl_per_sequence_mean: float, episodes: int) -> None: ...

    def state_dict(self) -> dict[str, float]: ...

    def load_state_dict(self, state: Mapping[str, float]) -> None: ...


class FixedKL:
    """Constant β.

    Raises:
        ConfigError: β is negative or not finite.
    """

    def __init__(self, kl_coef: float) -> None:
        if not (math.isfinite(kl_coef) and kl_coef >= 0):
            raise ConfigError(f"ppo.kl_coef must be finite and at least 0, got {kl_coef}")
        self.kl_coef = kl_coef

    def update(self, kl_per_sequence_mean: float, episodes: int) -> None:
        """Leave β as it is."""

    def state_dict(self) -> dict[str, float]:
        """State for `load_state_dict`."""
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take up a `state_dict` again."""
        self.kl_coef = state["kl_coef"]


class AdaptiveKL:
    """β ← β · (1 + clip(KL / target − 1, ±0.2) · n / horizon): proportional control of log β.

    KL is the sum of k1 over a response's tokens, averaged over the batch's responses. (verl and OpenRLHF feed the mean
    over tokens, so their targets are in another unit.)

    Source: Ziegler et al. 2019 (arXiv 1909.08593), section 2.2; openai/lm-human-preferences, train_policy.py.

    Args:
        kl_coef: β at the start, above 0: a product never leaves 0.
        target: nats per response to steer to.
        horizon: episodes. At the largest error β changes by a factor of about e^±0.2 in that many.

    Raises:
        ConfigError: one of them is not above 0, or not finite.
    """

    def __init__(self, kl_coef: float, target: float, horizon: float) -> None:
        for name, value in (("kl_coef", kl_coef), ("kl_target", target), ("kl_horizon", horizon)):
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"ppo.{name} must be finite and above 0 for the adaptive KL controller, got {value}")
        self.kl_coef = kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, kl_per_sequence_mean: float, episodes: int) -> None:
        """Update β with the KL of a batch of `episodes` responses.

        Raises:
            ConfigError: the batch is so large against the horizon that β could fall to 0 or below in one step.
            TrainingError: the KL is not finite.
        """
        if MAX_ERROR * episodes >= self.horizon:
            raise ConfigError(
                f"ppo.kl_horizon = {self.horizon} is too short for {episodes} responses an update: one step could turn "
                f"the KL coefficient to 0 or below; set it above {MAX_ERROR * episodes:g}, usually 100 updates' worth"
            )
        if not math.isfinite(kl_per_sequence_mean):
            raise TrainingError(
                f"the KL to the reference is {kl_per_sequence_mean}, so the KL coefficient ({self.kl_coef}) cannot be "
                f"steered; look for responses whose log-probabilities are not finite, or lower ppo.learning_rate"
            )
        error = min(max(kl_per_sequence_mean / self.target - 1, -MAX_ERROR), MAX_ERROR)
        self.kl_coef *= 1 + error * episodes / self.horizon

    def state_dict(self) -> dict[str, float]:
        """State for `load_state_dict`; target and horizon are parameters, not state."""
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take up a `state_dict` again."""
        self.kl_coef = state["kl_coef"]
