"""Checkpoints and snapshots that are known to be whole: their last file holds the digests of the others."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.core.errors import TrainingError

__all__ = [
    "COMPLETE_MARKER", "find_checkpoint", "find_damage", "list_checkpoints", "mark_complete", "refuse_hostile",
    "step_of",
]  # fmt: skip

COMPLETE_MARKER = "whole.json"  # written last: name of each file of a checkpoint or snapshot → its SHA-256


def list_checkpoints(folder: Path | None) -> list[Path]:
    """The checkpoints of a folder, whole or not, the newest first."""
    return sorted(folder.glob("checkpoint-[0-9]*"), key=step_of, reverse=True) if folder else []


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_checkpoint(folder: Path | None, on_problem: Callable[[str], None] = lambda _problem: None) -> Path | None:
    """The newest whole checkpoint; `on_problem` is called for each newer one, and where none is left."""
    found = list_checkpoints(folder)
    for checkpoint in found:
        if (problem := find_damage(checkpoint)) is None:
            return checkpoint
        on_problem(f"warning: the checkpoint {checkpoint} is passed over: {problem}")
    if found:
        on_problem(f"warning: no checkpoint is left in {folder}, so the training begins anew")
    return None


def find_damage(folder: Path) -> str | None:
    """Why the checkpoint or snapshot cannot be used; None if it is whole."""
    try:
        digests = dict(json.loads((folder / COMPLETE_MARKER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return "it is not complete"
    damaged = [name for name, digest in digests.items() if not _has_digest(folder / name, digest)]
    return f"{', '.join(damaged)} in it is missing or damaged" if damaged else None


def mark_complete(folder: Path) -> None:
    """Write the digests of the folder's files, all of which are then on the disk."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != COMPLETE_MARKER]
    digests = {str(path.relative_to(folder)): _sha256(path, sync=True) for path in files}
    (folder / COMPLETE_MARKER).write_text(json.dumps(digests, indent=2), encoding="utf-8")


@contextmanager
def refuse_hostile(checkpoint: Path | None) -> Iterator[None]:
    """What torch refuses to unpickle, as a TrainingError that names the checkpoint."""
    try:
        yield
    except pickle.UnpicklingError as error:
        message = f"{checkpoint} holds more than numbers and tensors, so it was not loaded: delete it, and run again"
        raise TrainingError(message) from error


def _has_digest(path: Path, digest: str) -> bool:
    try:
        return _sha256(path) == digest
    except OSError:
        return False


def _sha256(path: Path, *, sync: bool = False) -> str:
    """The SHA-256 of a file, once it is on the disk if so asked."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
