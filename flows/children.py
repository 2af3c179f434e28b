"""A stage in a process of its own, so that several run side by side, and one that hangs can be ended.

What the stage prints goes into a file of its own, since several would garble the terminal; what became of it comes back
as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from flows import offspring, screen
from flows.work import Outcome, bring_up_to_date
from tasks.core.errors import RLHFError, StageError
from tasks.core.paths import state_dir

__all__ = ["bring_up_to_date_in_child", "log_of", "stop_children"]

_children: set[subprocess.Popen[bytes]] = set()


def bring_up_to_date_in_child(
    name: str,
    *,
    force: bool,
    pull: bool,
    on_begin: Callable[[Sequence[str]], None],
    on_wait: Callable[[str], None],
    ranks: int = 1,
    device: str | None = None,
    timeout: float | None = None,
) -> Outcome:
    """`bring_up_to_date` in a child process; returns when that has ended.

    Args:
        device: the GPU that the child sees; None for all that this process sees.
        timeout: seconds after which the child is ended.

    Raises:
        RLHFError: what the stage raised in the child, or a StageError where the child was ended or hung.
    """
    reader, writer = os.pipe()
    words = [name, "--answer", str(writer), "--ranks", str(ranks)]
    words += [*(["--force"] if force else []), *(["--pull"] if pull else [])]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device is not None else {})
    log_of(name).parent.mkdir(parents=True, exist_ok=True)
    with log_of(name).open("wb") as log:
        child = offspring.start(
            ["-m", "flows.children", *words], output=log, environment=environment, pass_fds=[writer]
        )
    os.close(writer)
    _children.add(child)
    late = threading.Event()

    def end() -> None:
        late.set()
        offspring.stop(child)

    timer = threading.Timer(timeout or threading.TIMEOUT_MAX, end)
    timer.daemon = True
    timer.start()
    try:
        with os.fdopen(reader, encoding="utf-8") as answers:
            outcome = _listen(child, name, answers, on_begin, on_wait)
        child.wait()
    finally:
        timer.cancel()
        offspring.stop(child)
        _children.discard(child)
    if outcome is not None:
        return outcome
    if late.is_set():
        raise StageError(f"{name} was ended after {timeout:.0f} s, its time limit; it goes on from its checkpoint")
    raise StageError(f"{name}: its process ended with status {child.returncode}: {screen.tail(log_of(name))}")


def stop_children() -> None:
    """End every child, and wait for it."""
    stoppers = [threading.Thread(target=offspring.stop, args=[child]) for child in list(_children)]
    for stopper in stoppers:
        stopper.start()
    for stopper in stoppers:
        stopper.join()


def log_of(name: str) -> Path:
    """Where the stage's own output goes."""
    return state_dir() / "logs" / f"{name}.log"


def _listen(
    child: subprocess.Popen[bytes],
    name: str,
    answers: IO[str],
    on_begin: Callable[[Sequence[str]], None],
    on_wait: Callable[[str], None],
) -> Outcome | None:
    for line in answers:
        answer = json.loads(line)
        if "begins" in answer:
            on_begin(answer["begins"])  # may wait for a device, and the child waits with it
            offspring.go(child)
        elif "waits" in answer:
            on_wait(answer["waits"])
        elif "error" in answer:
            raise offspring.error_from(answer, f"{name}: {{}}; see {log_of(name)}")
        else:
            return Outcome(**answer["outcome"] | {"reasons": tuple(answer["outcome"]["reasons"])})
    return None


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--answer", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--pull", action="store_true")
    given = parser.parse_args()
    may_begin = offspring.follow_parent()
    with os.fdopen(given.answer, "w", encoding="utf-8") as pipe:

        def answer(**content: Any) -> None:
            pipe.write(json.dumps(content) + "\n")
            pipe.flush()

        def begins(reasons: Sequence[str]) -> None:
            answer(begins=list(reasons))
            may_begin.wait()

        try:
            outcome = bring_up_to_date(
                given.name,
                force=given.force,
                pull=given.pull,
                ranks=given.ranks,
                on_begin=begins,
                on_wait=lambda blocker: answer(waits=blocker),
            )
        except Exception as error:
            answer(**offspring.plain_error(error))
            if not isinstance(error, RLHFError):
                raise
            sys.exit(1)
        answer(outcome=asdict(outcome))


if __name__ == "__main__":
    _main()
