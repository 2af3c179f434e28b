"""Marks of what processes of this project hold elsewhere, such as a run that an MLflow server calls running.

A mark is a file that its process keeps locked. The operating system frees the lock however the process ends, so a mark
without a lock says that nobody holds the thing any more.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tasks.core.paths import state_dir

__all__ = ["MARKS_VAR", "abandoned", "forget", "hold", "is_locked", "marks_dir"]

MARKS_VAR = "RLHF_MARKS"
"""Where the marks of a run in a worktree are, which may be removed before they are looked at."""


def marks_dir() -> Path:
    """The folder of marks."""
    return Path(os.environ.get(MARKS_VAR) or state_dir() / "held")


@contextmanager
def hold(kind: str, name: str) -> Iterator[None]:
    """Keep a mark locked. The file stays: whoever ends the thing elsewhere calls `forget`."""
    path = _mark(kind, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}")
    with FileLock(draft):
        draft.rename(path)  # so that nobody finds it before it is locked
        yield


def abandoned(kind: str) -> list[str]:
    """Names of that kind that no living process holds."""
    marks = sorted(marks_dir().glob(f"{kind}.*"))
    return [path.name.removeprefix(f"{kind}.") for path in marks if not is_locked(path)]


def forget(kind: str, name: str) -> None:
    """Remove a mark: what it names has ended."""
    _mark(kind, name).unlink(missing_ok=True)


def _mark(kind: str, name: str) -> Path:
    return marks_dir() / f"{kind}.{name}"


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock of this file."""
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True
