"""Runs of stage sft that kill themselves, one after another: `python -m tests.support.killed_stage INPUTS FOLDER`.

A run kills itself at one of its moments: the begin or the end of an optimiser step, half-way through one of the files
of a checkpoint, or beside the writing of its mark. In the end one run goes on to the last step, and another, in
FOLDER/sft/whole, is not interrupted at all. Each run is a fork of this process, which has computed nothing.
"""

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.peft_model
import torch
from transformers import TrainerState

from tasks.core import tracking
from tasks.models import hf_training
from tasks.models.checkpoints import COMPLETE_MARKER
from tasks.models.hf_training import HistoryCallback
from tests.support.killed_run import between, kill_at
from tests.support.tiny_stages import RUNS

CHECKPOINT_MOMENTS = 8
"""Weights, arguments, optimiser, scheduler, random states, trainer's state; before the mark, after the mark."""


def watch(last: int) -> None:
    """Kill the process at this moment."""
    moment = kill_at(last)

    def halved(write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> None:
            write(*arguments, **options)
            path = next(Path(value) for value in arguments if isinstance(value, str | Path))
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])
            moment()
            path.write_bytes(content)

        return call

    torch.save = halved(torch.save)
    peft.peft_model.safe_save_file = halved(peft.peft_model.safe_save_file)
    TrainerState.save_to_json = halved(TrainerState.save_to_json)
    HistoryCallback.on_step_end = between(moment, HistoryCallback.on_step_end)
    HistoryCallback.on_save = between(moment, HistoryCallback.on_save)


def run(stage: str, inputs: Path, folder: Path, last: int | None) -> int:
    """Its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if last:
        watch(last)
    (folder / "out").mkdir(parents=True, exist_ok=True)
    with tracking.active_run(tracking.ActiveRun(stage, checkpoints=folder / "checkpoints")):
        RUNS[stage](inputs, folder / "out")
    os._exit(0)


def main(inputs: Path, folder: Path) -> None:
    hf_training.CHECKPOINT_STEPS = every = 5
    draw = random.Random(0)
    steps = 2 * every
    checkpoint = steps + CHECKPOINT_MOMENTS
    # Half-way through the second checkpoint, twice, so that each run gets one further; then between checkpoints.
    moments = [checkpoint + steps + draw.randint(1, CHECKPOINT_MOMENTS - 1) for _ in range(2)]
    for number, moment in enumerate([*moments, checkpoint + draw.randint(1, steps)], start=1):
        assert run("sft", inputs, folder / "sft", moment) == -signal.SIGKILL, f"it ended before moment {moment}"
        newest = folder / "sft" / "checkpoints" / f"checkpoint-{number * every}"
        assert (newest / COMPLETE_MARKER).is_file(), f"run {number} did not go on from the one before"
    assert run("sft", inputs, folder / "sft", None) == 0
    assert run("sft", inputs, folder / "sft" / "whole", None) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
