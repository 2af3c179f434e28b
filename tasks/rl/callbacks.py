"""Observers of RL training: curves, samples, warnings and snapshots."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from tqdm import tqdm

from tasks.core import distributed, tracking
from tasks.models.hf_training import PolicySnapshots
from tasks.rl.algorithm import Metrics

__all__ = ["Callback", "ProgressCallback", "SnapshotCallback"]


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
    """Sends metrics and samples to the tracker; shows reward, KL and entropy beside a progress bar."""

    def __init__(self, stage: str, updates: int) -> None:
        self._stage, self._updates = stage, updates
        self._bar: Any = None

    def on_log(self, metrics: Metrics, update: int) -> None:
        tracking.log_metrics(metrics, step=update)
        if self._bar is None:
            disabled = distributed.rank() > 0
            self._bar = tqdm(total=self._updates, initial=update - 1, desc=self._stage, unit="update", disable=disabled)
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
