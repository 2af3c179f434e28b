"""What could not be told to a server that is away: kept on disk in its order, told when the server is back."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

__all__ = ["Outbox", "deliver_left"]

RETRY_SECONDS = 30.0
SHOWN = 200  # characters of an error

Do = Callable[[str, Mapping[str, Any]], None]


class Outbox:
    """Does deeds at once while the server answers; else appends them to a file, and does them later.

    Delivery is at least once: what was done when the process was killed before it could be crossed out is done again,
    so a deed must not do harm when it is done twice.
    """

    def __init__(self, path: Path, do: Do, is_away: Callable[[Exception], bool], tell: Callable[[str], None]) -> None:
        self._path, self._do, self._is_away, self._tell = path, do, is_away, tell
        self._waiting = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._lock = FileLock(path.with_suffix(".lock"))
        self._tried = 0.0

    def put(self, deed: str, **content: Any) -> None:
        """Do it now, or keep it for later; what is kept survives this process.

        Raises:
            Exception: what the deed raised, where that does not mean that the server is away.
        """
        if self._waiting and time.monotonic() - self._tried > RETRY_SECONDS:
            self.deliver()
        if not self._waiting:
            try:
                self._do(deed, content)
                return
            except Exception as error:
                if not self._is_away(error):
                    raise
                self._begin(error)
        line = json.dumps({"deed": deed, "content": content})
        self._waiting.append(line)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def deliver(self) -> bool:
        """Do what waits; whether nothing is left."""
        self._tried = time.monotonic()
        while self._waiting:
            row = json.loads(self._waiting[0])
            try:
                self._do(row["deed"], row["content"])
            except Exception as error:
                if not self._is_away(error):
                    raise
                return False
            self._waiting.pop(0)
            self._write()
        if self._lock.is_locked:
            self._lock.release()
            Path(self._lock.lock_file).unlink(missing_ok=True)
        return True

    def _begin(self, error: Exception) -> None:
        self._tried = time.monotonic()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        self._tell(f"away, so what it should record is kept in {self._path} until it is back ({_brief(error)})")

    def _write(self) -> None:
        if not self._waiting:
            self._path.unlink(missing_ok=True)
            return
        draft = self._path.with_suffix(".draft")
        draft.write_text("".join(line + "\n" for line in self._waiting), encoding="utf-8")
        draft.replace(self._path)


def deliver_left(folder: Path, open_outbox: Callable[[Path], Outbox], tell: Callable[[str], None]) -> None:
    """Deliver what processes that have ended left behind; what is refused is set aside, and told."""
    for path in sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime):  # a flow's after its stages'
        lock = path.with_suffix(".lock")
        try:
            with FileLock(lock, timeout=0):
                if path.exists() and not open_outbox(path).deliver():
                    return
        except Timeout:  # its process lives, and delivers it itself
            continue
        except Exception as error:
            aside = path.rename(path.with_suffix(".refused"))
            tell(f"refuses what an earlier run left in {aside} ({_brief(error)})")
        lock.unlink(missing_ok=True)


def _brief(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= SHOWN else f"{lines[0][: SHOWN - 1]}…"
