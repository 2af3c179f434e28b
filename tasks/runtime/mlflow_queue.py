"""Queue of writes to an MLflow run, kept in a file while a remote server is unavailable."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from filelock import FileLock, Timeout

from tasks.runtime.mlflow_store import is_unavailable, store_uri

__all__ = ["QueuedRun", "flush_stale", "queued"]

RETRY_SECONDS = 30.0  # for so long a server that was away is not tried again
SHOWN = 200  # characters of an error

Arguments = ParamSpec("Arguments")
AnyRun = TypeVar("AnyRun", bound="QueuedRun")

_writes: dict[str, Callable[..., None]] = {}


def queued(write: Callable[Concatenate[AnyRun, Arguments], None]) -> Callable[Concatenate[AnyRun, Arguments], None]:
    """Send a method's calls through its run's queue. It gets its arguments as JSON gives them back: a path as its text.

    A call may be made twice, so that must do no harm.
    """
    name = write.__qualname__
    _writes[name] = write

    @functools.wraps(write)
    def submit(run: AnyRun, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        run.submit(name, args, kwargs)

    return submit


class QueuedRun:
    """Makes `queued` calls at once while the server answers; else appends them to a file and makes them later.

    Each is made at least once: one that was made when the process was killed before it was removed from the file is
    made again. The file's lock is held until the queue is closed.

    Attributes:
        time: when the call that is being made was submitted, in milliseconds.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, FileLock(file.with_suffix(".lock"))
        self._waiting = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self._last_attempt, self.time = 0.0, 0

    def submit(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make a call now, or keep it for later.

        Raises:
            Exception: what the call raised, where that does not mean that the server is away.
        """
        line = json.dumps([name, int(time.time() * 1000), args, kwargs], default=str)
        if self._waiting and time.monotonic() - self._last_attempt > RETRY_SECONDS:
            self.flush()
        if not self._waiting:
            try:
                self._call(line)
                return
            except Exception as error:
                if not is_unavailable(error):
                    raise
                self._start_queueing(error)
        self._waiting.append(line)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def flush(self) -> bool:
        """Make the calls that wait; returns whether none is left."""
        self._last_attempt = time.monotonic()
        while self._waiting:
            try:
                self._call(self._waiting[0])
            except Exception as error:
                if not is_unavailable(error):
                    raise
                return False
            del self._waiting[0]
            self._save()
        if self._lock.is_locked:
            self._lock.release()
            Path(self._lock.lock_file).unlink(missing_ok=True)
        return True

    def close(self) -> None:
        """Make the calls that wait, or leave them to `flush_stale`."""
        if not self.flush():
            self._lock.release()

    def _call(self, line: str) -> None:
        name, self.time, args, kwargs = json.loads(line)
        _writes[name](self, *args, **kwargs)

    def _start_queueing(self, error: Exception) -> None:
        self._last_attempt = time.monotonic()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        _warn(f"away, so what it should record is kept in {self._file} until it is back ({_first_line(error)})")

    def _save(self) -> None:
        if not self._waiting:
            self._file.unlink(missing_ok=True)
            return
        draft = self._file.with_suffix(".draft")
        draft.write_text("".join(line + "\n" for line in self._waiting), encoding="utf-8")
        draft.replace(self._file)


def flush_stale(folder: Path, open_run: Callable[[Path], QueuedRun]) -> None:
    """Make the calls that ended runs left in the folder; a file that MLflow refuses is set aside with a warning."""
    for file in sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime):  # a flow's after its stages'
        lock = file.with_suffix(".lock")
        try:
            with FileLock(lock, timeout=0):
                if file.exists() and not open_run(file).flush():
                    return
        except Timeout:  # its process lives, and makes them itself
            continue
        except Exception as error:
            aside = file.rename(file.with_suffix(".refused"))
            _warn(f"refuses what an earlier run left in {aside} ({_first_line(error)})")
        lock.unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:SHOWN]


def _warn(text: str) -> None:
    print(f"warning: MLflow at {store_uri()}: {text}", file=sys.stderr)
