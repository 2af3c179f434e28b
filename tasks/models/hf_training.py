"""Arguments, history and checkpoints of the stages that train with Hugging Face trainers.

A killed run resumes from its newest checkpoint; on a CPU its outputs are byte for byte those of an uninterrupted run.
The checkpoints are transformers' own. Three things that they lack are added here: a mark that one is whole, an order
of the data that follows from the epoch, and TRL's count of tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from peft import PeftModel
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasks.core import distributed, tracking
from tasks.core.errors import ConfigError, TrainingError
from tasks.core.rows import write_table
from tasks.core.terminal import Progress, print_line
from tasks.models.loading import device, save_adapter

if TYPE_CHECKING:
    from tasks.config.training import TrainerParams

__all__ = [
    "HistoryCallback", "PolicySnapshots", "train_or_resume", "trainer_arguments", "trainer_config", "write_history",
]  # fmt: skip

ConfigT = TypeVar("ConfigT", bound=TrainingArguments)

# Wall-clock figures differ between equal runs: they go to the tracker, never into a file that DVC hashes.
TIMINGS = ("_runtime", "_per_second", "step_time", "profiling/")

LOGGING_STEPS = 5
# A multiple of LOGGING_STEPS: no logged mean then spans a checkpoint, and what is saved has just passed `on_log`.
CHECKPOINT_STEPS = 25

SNAPSHOTS_DIR = "policies"
COMPLETE_MARKER = "whole.json"  # written last: name of each file of a checkpoint or snapshot → its SHA-256


def trainer_arguments(params: TrainerParams, *, seed: int) -> dict[str, Any]:
    """Trainer arguments shared by all stages: precision, checkpoint folder, no reporting.

    Several ranks share each batch, so that they take the steps of one process; ConfigError where they cannot.
    """
    distributed.per_rank(params.batch_size, "batch_size")
    on_gpu = device().type == "cuda"
    checkpoints = tracking.checkpoint_dir()
    return {
        "output_dir": str(checkpoints or _scratch_folder().name),
        "seed": seed,
        "data_seed": seed,
        "per_device_train_batch_size": params.batch_size,
        "per_device_eval_batch_size": 4 * params.batch_size,
        "learning_rate": params.learning_rate,
        "num_train_epochs": params.epochs,
        # transformers' `constant` has no warmup; with none both are the same
        "lr_scheduler_type": "constant_with_warmup" if params.lr_scheduler == "constant" else params.lr_scheduler,
        "warmup_steps": params.warmup_share,
        "weight_decay": params.weight_decay,
        "use_cpu": not on_gpu,
        "bf16": on_gpu,
        "gradient_checkpointing": False,
        "save_strategy": "steps" if checkpoints else "no",
        "save_steps": CHECKPOINT_STEPS,
        "save_total_limit": 2,  # the older one is deleted before the newer one has its mark
        "report_to": "none",
        "logging_steps": LOGGING_STEPS,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it would hide what must stop the training
        "disable_tqdm": True,
        "dataloader_pin_memory": on_gpu,
        "accelerator_config": {"split_batches": True},
    }


def trainer_config(kind: type[ConfigT], params: TrainerParams, section: str, **arguments: Any) -> ConfigT:
    """Configuration of a trainer: the arguments of the stage, and the options of `params.trl`.

    Raises:
        ConfigError: an option is unknown, is one of the arguments, or has a value that the configuration refuses.
    """
    known = {item.name for item in dataclasses.fields(kind) if item.init}
    for name in params.trl:
        if name in arguments:
            raise ConfigError(f"{section}.trl.{name}: the stage sets it itself, from its other keys; remove it")
        if name not in known:
            near = get_close_matches(name, known, n=1)
            cure = f"did you mean {near[0]}?" if near else "remove it"
            raise ConfigError(f"{section}.trl.{name}: {kind.__name__} has no such option; {cure}")
    try:
        return kind(**arguments, **params.trl)
    except (TypeError, ValueError) as error:
        if not params.trl:
            raise
        raise ConfigError(f"{section}.trl: {kind.__name__} refuses {params.trl}: {error}") from error


@cache
def _scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A temporary output folder for trainers, removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="rlhf-trainer-")


def train_or_resume(trainer: Trainer) -> None:
    """Train, resuming from the newest complete checkpoint if there is one.

    Raises:
        TrainingError: the loss or the gradient is not finite, the ranks have not trained the same model, or the
            checkpoint holds more than numbers and tensors.
    """
    checkpoint = _find_checkpoint(_warn_of_damage)
    if checkpoint:
        logged = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).log_history
        # TRL logs this count and saves it nowhere else.
        counts = [entry["num_tokens"] for entry in logged if "num_tokens" in entry]
        setattr(trainer, "_total_train_tokens", int(counts[-1]) if counts else 0)  # noqa: B010
    assert trainer.model is not None
    # Accelerate takes a model that was only evaluated as prepared for training; each rank would then train alone.
    setattr(trainer.model, "_is_accelerate_prepared", False)  # noqa: B010
    trainer.remove_callback(PrinterCallback)  # `HistoryCallback` shows progress
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except pickle.UnpicklingError as error:
        message = f"{checkpoint} holds more than numbers and tensors, so it was not loaded: delete it, and run again"
        raise TrainingError(message) from error
    distributed.check_in_sync(weight for weight in trainer.model.parameters() if weight.requires_grad)


def _find_checkpoint(on_problem: Callable[[str], None] = lambda _problem: None) -> Path | None:
    """The newest whole checkpoint; transformers' get_last_checkpoint gives one that a kill cut short as well.

    `on_problem` is called for each newer one, and where none is left.
    """
    folder = tracking.checkpoint_dir()
    found = sorted(folder.glob("checkpoint-[0-9]*"), key=_step, reverse=True) if folder else []
    for checkpoint in found:
        if (problem := _find_damage(checkpoint)) is None:
            return checkpoint
        on_problem(f"warning: the checkpoint {checkpoint} is passed over: {problem}")
    if found:
        on_problem(f"warning: no checkpoint is left in {folder}, so the training begins anew")
    return None


def _find_damage(checkpoint: Path) -> str | None:
    """Why the checkpoint cannot be used; None if it is whole."""
    try:
        digests = dict(json.loads((checkpoint / COMPLETE_MARKER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return "it is not complete"
    damaged = [name for name, digest in digests.items() if not _has_digest(checkpoint / name, digest)]
    return f"{', '.join(damaged)} in it is missing or damaged" if damaged else None


def _has_digest(path: Path, digest: str) -> bool:
    try:
        return _sha256(path) == digest
    except OSError:
        return False


def _sha256(path: Path, *, sync: bool = False) -> str:
    """The SHA-256 of a file, once it is on the disk if so asked."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mark_complete(folder: Path) -> None:
    """Write the digests of the folder's files, all of which are then on the disk."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != COMPLETE_MARKER]
    digests = {str(path.relative_to(folder)): _sha256(path, sync=True) for path in files}
    (folder / COMPLETE_MARKER).write_text(json.dumps(digests, indent=2), encoding="utf-8")


def _warn_of_damage(problem: str) -> None:
    if distributed.rank() == 0:
        print_line(problem)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


class HistoryCallback(TrainerCallback):
    """Collects what a trainer logs, sends it to the tracker, shows progress, and stops on a loss that is not finite.

    The rows follow from the trainer's own log, which is part of its checkpoints.
    """

    def __init__(self, stage: str) -> None:
        self.rows: list[dict[str, float]] = []
        self._stage = stage

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.rows = [_row(entry) for entry in state.log_history if "loss" in entry]
        if state.global_step and state.is_world_process_zero:
            place = f"step {state.global_step} of {state.max_steps}"
            print_line(f"{self._stage}: goes on from {place} (checkpoint of an interrupted run)")
        for entry in state.log_history:  # the curves of a resumed run are complete, too
            tracking.log_metrics(_numeric(entry), step=int(entry["step"]))
        hidden = not state.is_world_process_zero
        self._progress = Progress(self._stage, state.max_steps, "step", done=state.global_step, hidden=hidden)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Derive the order of the data from the seed and the epoch; the first epoch's is the trainer's own.

        It would else follow from all orders drawn before, and a run that goes on in a later epoch draws none of them.
        """
        if epoch := int(state.epoch or 0):
            batches = train_dataloader.batch_sampler
            sampler = getattr(batches, "batch_sampler", batches).sampler
            sampler.generator = torch.Generator().manual_seed(args.seed + epoch)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._progress.update(state.global_step)
        if state.global_step >= state.max_steps:
            control.should_save = False  # nothing is left to go on with, and this step need not have been logged

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Mark the checkpoint as complete once every rank's part is on the disk."""
        distributed.barrier()
        if state.is_world_process_zero:
            _mark_complete(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.close()

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Log; stop on a loss that is not finite, before the checkpoint of that step is saved."""
        numbers = _numeric(logs or {})
        if not all(abs(numbers.get(key, 0.0)) < float("inf") for key in ("loss", "grad_norm")):
            checkpoint = _find_checkpoint()
            kept = f"; the checkpoint of step {_step(checkpoint)} is kept" if checkpoint else ""
            raise TrainingError(
                f"step {state.global_step}: loss or gradient is not finite: {numbers}; lower learning_rate{kept}"
            )
        tracking.log_metrics(numbers, step=state.global_step)
        if "loss" in numbers:
            self.rows.append(_row(state.log_history[-1]))
            self._progress.update(state.global_step, {"loss": numbers["loss"]})


class PolicySnapshots:
    """Snapshots of a policy during training, in `policies/<update>/adapter` of the stage's folder.

    Until the end they lie with the run's checkpoints, so that a resumed run still has them.
    """

    def __init__(self, every: int, out: Path) -> None:
        self._every, self._out = every, out / SNAPSHOTS_DIR
        self._folder = (tracking.checkpoint_dir() or out) / SNAPSHOTS_DIR

    def save(self, update: int, model: PeftModel) -> None:
        """Save a snapshot if this update is due."""
        if update % self._every == 0 and distributed.rank() == 0:
            save_adapter(model, self._folder / f"{update:04d}")
            if self._folder != self._out:
                _mark_complete(self._folder / f"{update:04d}")

    def publish(self) -> None:
        """Copy the snapshots into the stage's output folder; one that is not whole is left out, with a warning."""
        self._out.mkdir(parents=True, exist_ok=True)
        for snapshot in sorted(self._folder.glob("*")) if self._folder != self._out else ():
            if problem := _find_damage(snapshot):
                _warn_of_damage(f"warning: the snapshot {snapshot} is left out: {problem}")
                continue
            ignored = shutil.ignore_patterns(COMPLETE_MARKER)
            shutil.copytree(snapshot, self._out / snapshot.name, dirs_exist_ok=True, ignore=ignored)


def _row(entry: Mapping[str, Any]) -> dict[str, float]:
    """An entry of the trainer's log without its timings; keys in order, because a checkpoint sorts them."""
    numbers = dict(sorted(_numeric(entry).items()))
    kept = {key: value for key, value in numbers.items() if not any(part in key for part in TIMINGS)}
    return kept | {"step": entry["step"]}


def _numeric(entry: Mapping[str, Any]) -> dict[str, float]:
    """The numeric values of a log entry, without its step."""
    return {key: float(value) for key, value in entry.items() if isinstance(value, int | float) and key != "step"}


def write_history(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write curves as CSV: one row per logged step, `step` first, then every other column by name."""
    write_table(path, rows, ["step", *sorted({key for row in rows for key in row} - {"step"})])
