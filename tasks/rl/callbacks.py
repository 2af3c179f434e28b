"""Observers of RL training, the checkpoint of an interrupted run, and the weights before an update."""

import math
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from tasks.core import distributed, tracking
from tasks.core.terminal import Progress, print_line
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
    """Saves a snapshot of the policy after each update that is due."""

    def __init__(self, snapshots: PolicySnapshots, model: PeftModel) -> None:
        self._snapshots, self._model = snapshots, model

    def on_update_end(self, update: int) -> None:
        self._snapshots.save(update, self._model)


class Checkpoint:
    """The newest two checkpoints, files that rank 0 writes and all read; without a folder nothing is saved."""

    def __init__(self, folder: Path | None, stage: str) -> None:
        self._files = [] if folder is None else [folder / f"{stage}.pt", folder / f"{stage}.previous.pt"]

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state atomically, and keep the one before: a disk may lose what it has taken."""
        if not self._files or distributed.rank() > 0:
            return
        newest, previous = self._files
        newest.parent.mkdir(parents=True, exist_ok=True)
        temporary = newest.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        if newest.exists():
            newest.replace(previous)
        temporary.replace(newest)

    def load(self, current: Mapping[str, Any], warn: Callable[[str], None]) -> dict[str, Any]:
        """Read the newest state that is whole; empty where there is none.

        Args:
            current: the state of the run that is to go on, with the same keys and shapes of weights.
            warn: called for each file that cannot be used.
        """
        found = [file for file in self._files if file.exists()]
        for file in found:
            try:
                return _read_state(file, current)
            except ValueError as problem:
                warn(f"warning: the checkpoint {file} is passed over: {problem}")
        if found:
            warn("warning: no checkpoint is left, so the training begins anew")
        return {}

    def remove(self) -> None:
        for file in self._files:
            file.unlink(missing_ok=True)


def _read_state(file: Path, current: Mapping[str, Any]) -> dict[str, Any]:
    """See `Checkpoint.load`; a ValueError says why it cannot be used."""
    try:
        with zipfile.ZipFile(file) as archive:  # torch does not check the sums
            damaged = archive.testzip()
        state: Any = None if damaged else torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("refused, since it holds more than numbers and tensors; none of it was executed") from error
    except Exception as error:  # whatever bytes can make zipfile and torch raise
        raise ValueError(f"it is damaged ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.keys() != current.keys():
        raise ValueError("it is damaged")
    shapes, expected = ({name: value.shape for name, value in of["weights"].items()} for of in (state, current))
    if shapes != expected:
        raise ValueError("its weights have other names or shapes")
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
