"""Arguments, history and checkpoints of the stages that train with Hugging Face trainers.

A killed run resumes from its newest checkpoint; on a CPU its outputs are byte for byte those of an uninterrupted run.
The checkpoints are transformers' own. Three things that they lack are added here: a mark that one is whole, an order
of the data that follows from the epoch, and TRL's count of tokens.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasks.core import distributed, tracking
from tasks.core.errors import ConfigError, TrainingError
from tasks.core.rows import write_table
from tasks.core.terminal import Progress, print_line
from tasks.models.checkpoints import find_checkpoint, mark_complete, refuse_hostile, step_of
from tasks.models.loading import device

if TYPE_CHECKING:
    from tasks.config.training import TrainerParams

__all__ = ["HistoryCallback", "train_or_resume", "trainer_arguments", "trainer_config", "write_history"]

ConfigT = TypeVar("ConfigT", bound=TrainingArguments)

# Wall-clock figures differ between equal runs: they go to the tracker, never into a file that DVC hashes.
TIMINGS = ("_runtime", "_per_second", "step_time", "profiling/")

LOGGING_STEPS = 5
# A multiple of LOGGING_STEPS: no logged mean then spans a checkpoint, and what is saved has just passed `on_log`.
CHECKPOINT_STEPS = 25


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
    checkpoint = find_checkpoint(tracking.checkpoint_dir(), _warn_of_damage)
    if checkpoint:
        logged = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).log_history
        # TRL logs this count and saves it nowhere else.
        counts = [entry["num_tokens"] for entry in logged if "num_tokens" in entry]
        setattr(trainer, "_total_train_tokens", int(counts[-1]) if counts else 0)  # noqa: B010
    assert trainer.model is not None
    # Accelerate takes a model that was only evaluated as prepared for training; each rank would then train alone.
    setattr(trainer.model, "_is_accelerate_prepared", False)  # noqa: B010
    trainer.remove_callback(PrinterCallback)  # `HistoryCallback` shows progress
    with refuse_hostile(checkpoint):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    distributed.check_in_sync(weight for weight in trainer.model.parameters() if weight.requires_grad)


def _warn_of_damage(problem: str) -> None:
    if distributed.rank() == 0:
        print_line(problem)


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
            mark_complete(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.close()

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Log; stop on a loss that is not finite, before the checkpoint of that step is saved."""
        numbers = _numeric(logs or {})
        if not all(abs(numbers.get(key, 0.0)) < float("inf") for key in ("loss", "grad_norm")):
            checkpoint = find_checkpoint(tracking.checkpoint_dir())
            kept = f"; the checkpoint of step {step_of(checkpoint)} is kept" if checkpoint else ""
            raise TrainingError(
                f"step {state.global_step}: loss or gradient is not finite: {numbers}; lower learning_rate{kept}"
            )
        tracking.log_metrics(numbers, step=state.global_step)
        if "loss" in numbers:
            self.rows.append(_row(state.log_history[-1]))
            self._progress.update(state.global_step, {"loss": numbers["loss"]})


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
