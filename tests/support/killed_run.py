"""A PPO run that kills itself at the n-th of its moments: `python -m tests.support.killed_run FOLDER N`.

A moment is before or after a rollout, its scoring, an optimiser step, or half-way through the writing of a checkpoint.
Without N it goes on to the end and writes what it has become to FOLDER/result.pt.
"""

from __future__ import annotations

import io
import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.unit.rl.test_ppo import trainer, weights


def main(folder: Path, last: int | None) -> None:
    moments = itertools.count(1)

    def moment() -> None:
        if next(moments) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            moment()
            result = function(*arguments)
            moment()
            return result

        return call

    def slow_save(state: Any, file: io.BufferedWriter) -> None:
        buffer = io.BytesIO()
        save(state, buffer)
        content = buffer.getvalue()
        file.write(content[: len(content) // 2])
        file.flush()
        moment()
        file.write(content[len(content) // 2 :])

    ppo = trainer(checkpoints=folder / "checkpoints", updates=6, checkpoint_every=1)
    for part, name in ((ppo, "_rollout"), (ppo, "_experience"), (ppo.updater, "step")):
        setattr(part, name, watched(getattr(part, name)))
    save, torch.save = torch.save, slow_save
    ppo.train()
    folder.mkdir(exist_ok=True)
    save({"history": ppo.history, "samples": ppo.samples, "weights": weights(ppo)}, folder / "result.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
