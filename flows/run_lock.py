"""Lock of a project folder, for one run at a time: a second run could change params.yaml between two stages."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime

from filelock import FileLock, Timeout

from tasks.core.paths import state_dir

__all__ = ["project_lock"]


@contextmanager
def project_lock(on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold the project's lock, after other runs have released it; re-entrant.

    The lock is the operating system's: it goes with the process that holds it, however that ends.

    Args:
        on_wait: called once with the holder's process id, before the wait.
    """
    folder = state_dir()
    folder.mkdir(exist_ok=True)
    holder_file = folder / "run.txt"
    lock = FileLock(folder / "run.lock", is_singleton=True, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_wait(holder_file.read_text(encoding="utf-8") if holder_file.exists() else "")
        lock.acquire()
    try:
        holder_file.write_text(f"process {os.getpid()}, since {datetime.now():%Y-%m-%d %H:%M:%S}", encoding="utf-8")
        yield
    finally:
        lock.release()
