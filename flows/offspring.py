"""A child process that ends with its parent, however that came about: it watches a pipe that the parent holds open."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

from tasks.core import errors
from tasks.core.errors import RLHFError, StageError
from tasks.core.paths import project_root

__all__ = ["error_from", "follow_parent", "go", "plain_error", "start", "stop"]

STOP_SECONDS = 30.0
GO = b"\n"


def start(
    words: Sequence[str],
    *,
    output: IO[bytes] | None = None,
    environment: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """`python words…` in the project's folder, in a session of its own; it must call `follow_parent`.

    Args:
        output: where what it prints goes; None for where this process prints.
        environment: None for this process's.
        pass_fds: other open files that it keeps.
    """
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=project_root(),
        env=environment,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        pass_fds=pass_fds,
        start_new_session=True,
    )


def go(child: subprocess.Popen[bytes]) -> None:
    """Set the event that the child's `follow_parent` returned."""
    assert child.stdin
    child.stdin.write(GO)
    child.stdin.flush()


def stop(child: subprocess.Popen[bytes]) -> None:
    """Close the pipe, which interrupts the child; kill it with all its own children where it does not end."""
    assert child.stdin
    child.stdin.close()
    try:
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def plain_error(error: Exception) -> dict[str, str]:
    """In the child: an error as JSON can say it."""
    return {"error": str(error), "kind": type(error).__name__}


def error_from(content: Mapping[str, str], unknown: str) -> RLHFError:
    """In the parent: the error that the child had; `unknown` with `{}` for its text where it is none of ours."""
    kind = getattr(errors, content["kind"], None)
    return kind(content["error"]) if kind else StageError(unknown.format(content["error"]))


def follow_parent() -> threading.Event:
    """In the child: from now on, be interrupted when the parent is gone; the event tells of its `go`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    may_begin = threading.Event()
    threading.Thread(target=_watch, args=[may_begin], daemon=True).start()
    return may_begin


def _watch(may_begin: threading.Event) -> None:
    if os.read(0, len(GO)) == GO:  # not by sys.stdin, whose lock Python wants when it ends
        may_begin.set()
        os.read(0, 1)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(STOP_SECONDS)
    os.killpg(0, signal.SIGKILL)
