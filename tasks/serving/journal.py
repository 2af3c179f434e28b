"""What MLflow shall record, kept on disk until it has.

A server appends to a file that it holds locked; a thread delivers closed files. A server that was killed leaves its
file unlocked, and the next server, or `rlhf feedback`, delivers it.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from tasks.core.errors import StageError, first_line
from tasks.core.paths import state_dir
from tasks.runtime.mlflow_store import flush_stale, warn
from tasks.runtime.mlflow_traces import TraceQueue

__all__ = ["Journal", "deliver", "journal_dir", "waiting_lines"]

DELIVER_SECONDS = 1.0
MAX_BYTES = 256 * 2**20


def journal_dir() -> Path:
    """The folder of what waits for MLflow."""
    return state_dir() / "serving" / "journal"


def deliver() -> None:
    """Write to MLflow what servers have left; nothing happens while it is away."""
    flush_stale(journal_dir(), TraceQueue)


def waiting_lines() -> list[str]:
    """The records that MLflow does not have yet."""
    return [line for file in journal_dir().glob("*.jsonl") for line in file.read_text(encoding="utf-8").splitlines()]


class Journal:
    """The journal of one server.

    Attributes:
        dropped: records that found it full.
        waiting: bytes that MLflow does not have yet.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.dropped, self.waiting, self._max_bytes = 0, 0, max_bytes
        self._mutex, self._stop = threading.Lock(), threading.Event()
        journal_dir().mkdir(parents=True, exist_ok=True)
        self._open()
        self._thread = threading.Thread(target=self._deliver, name="journal", daemon=True)
        self._thread.start()

    def append(self, write: Callable[..., None], content: Mapping[str, Any], *, durable: bool) -> None:
        """Keep a call of a method of `TraceQueue`: it outlives this process; if durable, the machine too.

        Raises:
            StageError: the journal is full, since MLflow has been away for long; the record is counted in `dropped`.
        """
        line = json.dumps([write.__qualname__, int(time.time() * 1000), [content], {}]).encode() + b"\n"
        with self._mutex:
            if self.waiting + len(line) > self._max_bytes:
                self.dropped += 1
                raise StageError(f"MLflow has been away for so long that {journal_dir()} is full; nothing was stored")
            self._file.write(line)
            self.waiting += len(line)
            if durable:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """End deliveries; what is left waits on disk."""
        self._stop.set()
        self._thread.join()
        self._close()

    def _open(self) -> None:
        self._path = journal_dir() / f"{uuid.uuid4().hex}.jsonl"
        self._lock = FileLock(self._path.with_suffix(".lock"), thread_local=False)
        self._lock.acquire()
        self._file = self._path.open("ab", buffering=0)

    def _close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
        self._lock.release()

    def _deliver(self) -> None:
        while not self._stop.wait(DELIVER_SECONDS):
            with self._mutex:
                closed = [file for file in journal_dir().glob("*.jsonl") if file != self._path]
                if self._path.stat().st_size and not closed:
                    self._close()
                    self._open()
            try:
                deliver()
            except Exception as error:  # whatever it is, answers must go on, and what waits is on disk
                warn(first_line(error))
            with self._mutex:
                self.waiting = sum(file.stat().st_size for file in journal_dir().glob("*.jsonl"))
