"""An RL run that kills itself at the n-th of its moments: `python -m tests.support.killed_run ALGORITHM FOLDER N`.

A moment is before or after a rollout, its scoring, an optimiser step, or half-way through the writing of a checkpoint.
Without N it goes on to the end and writes what it has become to FOLDER/result.pt.
"""

import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tasks.config.rl import RLParams
from tests.support.tiny_trainer import GRPO_PARAMS, PARAMS, trainer, weights


def kill_at(last: int | None) -> Callable[[], None]:
    """A function whose call of that number kills this process."""
    moments = itertools.count(1)

    def moment() -> None:
        if next(moments) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    return moment


def between(moment: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with a moment before and one after it."""

    def call(*arguments: Any, **options: Any) -> Any:
        moment()
        result = function(*arguments, **options)
        moment()
        return result

    return call


def main(params: RLParams, folder: Path, last: int | None) -> None:
    moment = kill_at(last)

    def slow_save(state: Any, path: Path) -> None:
        save(state, path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        moment()
        path.write_bytes(content)

    run = trainer(params, checkpoints=folder / "checkpoints", updates=6, checkpoint_every=1)
    for part, name in ((run, "sample"), (run, "score"), (run.updater, "step")):
        setattr(part, name, between(moment, getattr(part, name)))
    save, torch.save = torch.save, slow_save
    run.train()
    folder.mkdir(exist_ok=True)
    records = {"history": run.history, "samples": run.samples, "rollouts": run.rollouts}
    save({**records, "weights": weights(run)}, folder / "result.pt")


if __name__ == "__main__":
    chosen = PARAMS if sys.argv[1] == "ppo" else GRPO_PARAMS
    main(chosen, Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
