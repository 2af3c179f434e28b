"""Observers of RL training, the checkpoint of an interrupted run, and the weights before an update."""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm

from tasks.core import distributed, tracking
from tasks.models.hf_training import PolicySnapshots
from tasks.rl.algorithm import Metrics
from tasks.rl.policy import Policy

__all__ = ["Callback", "Checkpoint", "KLBudget", "ProgressCallback", "SnapshotCallback", "load_weights"]


class Callback:
    """Observer of training, in the manner of transformers' TrainerCallback; by default it does nothing."""

    def on_update_end(self, update: int) -> None:
        """After an update, from 1, and before its checkpoint."""

    def on_log(self, metrics: Metrics, update: int) -> None:
        """Metrics of an update; a resumed run repeats those of the updates before."""

    def on_samples(self, rows: Sequence[dict[str, Any]], update: int) -> None:
        """A few responses of an update, for people to read."""

    def on_warning(self, message: str) -> None:
        """A message for the user."""

    def on_train_end(self) -> None:
        """After the last update."""


class ProgressCallback(Callback):
    """Sends metrics and samples to the tracker; shows a progress bar."""

    def __init__(self, stage: str, updates: int) -> None:
        self._stage, self._updates = stage, updates
        self._bar: Any = None

    def on_log(self, metrics: Metrics, update: int) -> None:
        tracking.log_metrics(metrics, step=update)
        if self._bar is None:
            hidden = distributed.rank() > 0
            self._bar = tqdm(total=self._updates, initial=update - 1, desc=self._stage, unit="update", disable=hidden)
        self._bar.update()
        self._bar.set_postfix({name: f"{metrics[name]:.3g}" for name in ("reward", "kl", "entropy")})

    def on_samples(self, rows: Sequence[dict[str, Any]], update: int) -> None:
        tracking.log_samples("samples", rows, step=update)

    def on_warning(self, message: str) -> None:
        if distributed.rank() == 0:
            tqdm.write(f"{self._stage}: {message}", file=sys.stderr)

    def on_train_end(self) -> None:
        if self._bar is not None:
            self._bar.close()


class SnapshotCallback(Callback):
    """Saves a snapshot of the policy after each update that is due."""

    def __init__(self, snapshots: PolicySnapshots, model: PeftModel) -> None:
        self._snapshots, self._model = snapshots, model

    def on_update_end(self, update: int) -> None:
        self._snapshots.save(update, self._model)


class Checkpoint:
    """The newest checkpoint, a file that rank 0 writes and all read; without a folder nothing is saved."""

    def __init__(self, folder: Path | None, stage: str) -> None:
        self._file = None if folder is None else folder / f"{stage}.pt"

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state atomically."""
        if self._file is None or distributed.rank() > 0:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._file.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._file)

    def load(self) -> dict[str, Any]:
        """Read the state; empty where there is none."""
        if self._file is None or not self._file.is_file():
            return {}
        return dict(torch.load(self._file, weights_only=True))

    def remove(self) -> None:
        if self._file is not None:
            self._file.unlink(missing_ok=True)


class KLBudget:
    """Limit of the KL to the reference, with the weights of the last policy within it."""

    def __init__(self, policy: Policy, limit: float | None) -> None:
        self._policy, self.limit = policy, math.inf if limit is None else limit
        self.weights: dict[str, Tensor] = {}

    @property
    def is_limited(self) -> bool:
        return math.isfinite(self.limit)

    def exceeded(self, kl: float) -> bool:
        """Whether this KL, nats per response, is over the limit."""
        return kl > self.limit

    def keep_weights(self) -> None:
        """Copy the weights of a policy within the limit, where there is one."""
        if self.is_limited:
            parameters = self._policy.trainable_parameters()
            self.weights = {name: value.detach().clone() for name, value in parameters.items()}


def load_weights(policy: Policy, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into the policy's trainable parameters."""
    parameters = policy.trainable_parameters()
    for name, value in weights.items():
        parameters[name].data.copy_(value)
