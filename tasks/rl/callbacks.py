"""Observers of RL training, the checkpoint of an interrupted run, and the weights before an update."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from tasks.core import distributed, tracking
from tasks.core.terminal import Progress, print_line
from tasks.models.checkpoints import (
    COMPLETE_MARKER,
    find_checkpoint,
    find_damage,
    list_checkpoints,
    mark_complete,
    refuse_hostile,
)
from tasks.models.loading import save_weights
from tasks.rl.algorithm import Metrics
from tasks.rl.policy import Policy

__all__ = ["Callback", "Checkpoint", "KLBudget", "ProgressCallback", "SnapshotCallback", "load_weights"]

SNAPSHOTS_DIR, STATE_FILE = "policies", "state.pt"


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
        self._progress: Progress | None = None

    def on_log(self, metrics: Metrics, update: int) -> None:
        tracking.log_metrics(metrics, step=update)
        if self._progress is None:
            hidden = distributed.rank() > 0
            self._progress = Progress(self._stage, self._updates, "update", done=update - 1, hidden=hidden)
        self._progress.update(update, {name: metrics[name] for name in ("reward", "kl", "entropy")})

    def on_samples(self, rows: Sequence[dict[str, Any]], update: int) -> None:
        tracking.log_samples("samples", rows, step=update)

    def on_warning(self, message: str) -> None:
        if distributed.rank() == 0:
            print_line(f"{self._stage}: {message}")

    def on_train_end(self) -> None:
        if self._progress is not None:
            self._progress.close()


class SnapshotCallback(Callback):
    """Saves the policy every so many updates, in `policies/<update>/adapter` of the stage's folder.

    Until the end the snapshots lie with the run's checkpoints, so that a resumed run still has them.
    """

    def __init__(self, model: PeftModel | PreTrainedModel, every: int, out: Path) -> None:
        self._model, self._every, self._out = model, every, out / SNAPSHOTS_DIR
        self._folder = (tracking.checkpoint_dir() or out) / SNAPSHOTS_DIR

    def on_update_end(self, update: int) -> None:
        if update % self._every == 0 and distributed.rank() == 0:
            save_weights(self._model, self._folder / f"{update:04d}")
            if self._folder != self._out:
                mark_complete(self._folder / f"{update:04d}")

    def on_train_end(self) -> None:
        """Copy the snapshots into the stage's output folder; one that is not whole is left out, with a warning."""
        self._out.mkdir(parents=True, exist_ok=True)
        for snapshot in sorted(self._folder.glob("*")) if self._folder != self._out else ():
            if (problem := find_damage(snapshot)) is None:
                ignored = shutil.ignore_patterns(COMPLETE_MARKER)
                shutil.copytree(snapshot, self._out / snapshot.name, dirs_exist_ok=True, ignore=ignored)
            elif distributed.rank() == 0:
                print_line(f"warning: the snapshot {snapshot} is left out: {problem}")


class Checkpoint:
    """The newest two checkpoints of a folder, which rank 0 writes and all read; without a folder nothing is saved."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._last: Path | None = None

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state of an update, and keep the one before: a disk may lose what it has taken."""
        if self._folder is None or distributed.rank() > 0:
            return
        checkpoint = self._folder / f"checkpoint-{state['update']}"
        shutil.rmtree(checkpoint, ignore_errors=True)  # a damaged one of an interrupted run
        checkpoint.mkdir(parents=True)
        torch.save(dict(state), checkpoint / STATE_FILE)
        mark_complete(checkpoint)
        for other in set(list_checkpoints(self._folder)) - {checkpoint, self._last}:
            shutil.rmtree(other)
        self._last = checkpoint

    def load(self, warn: Callable[[str], None]) -> dict[str, Any]:
        """Read the newest state that is whole; empty where there is none. `warn` is called for each that is not.

        Raises:
            TrainingError: it holds more than numbers and tensors.
        """
        self._last = find_checkpoint(self._folder, warn)
        if self._last is None:
            return {}
        with refuse_hostile(self._last):
            state: dict[str, Any] = torch.load(self._last / STATE_FILE, map_location="cpu", weights_only=True)
        return state


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
