"""What a stage may say about its run, and where it may keep checkpoints.

Stages import this module, so it knows no vendor: whoever runs the stage attaches a recorder to it (see
`tasks.runtime.stage_runner`), and how runs are recorded can change without any stage having to run again. Without a
recorder (a unit test, a notebook) every function does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

__all__ = [
    "ActiveRun",
    "Recorder",
    "active",
    "current_checkpoints",
    "log_file",
    "log_metrics",
    "log_samples",
    "part",
]


class Recorder(Protocol):
    """Where a run's numbers, tables and files go."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None) -> None: ...

    def log_samples(self, name: str, rows: Sequence[Mapping[str, object]], step: int | None) -> None: ...

    def log_file(self, path: Path, folder: str | None) -> None: ...


@dataclass(frozen=True)
class ActiveRun:
    """The stage run that is going on in this process."""

    stage: str
    recorder: Recorder | None = None
    checkpoints: Path | None = None
    prefix: str = ""


# Not a ContextVar: stages run one after another, and threads that a trainer starts must find the run as well.
_active: ActiveRun | None = None


@contextmanager
def active(run: ActiveRun) -> Iterator[None]:
    """Make this the run that the functions below speak of."""
    global _active
    before, _active = _active, run
    try:
        yield
    finally:
        _active = before


@contextmanager
def part(name: str) -> Iterator[None]:
    """Within it, numbers carry this name and checkpoints have a folder of it: for one of several models of a stage."""
    if _active is None:
        yield
        return
    checkpoints = _active.checkpoints / name if _active.checkpoints else None
    with active(replace(_active, checkpoints=checkpoints, prefix=f"{name}/")):
        yield


def log_metrics(metrics: Mapping[str, float], step: int | None = None) -> None:
    """Record numbers, at a step if they belong to a curve."""
    if _active and _active.recorder:
        _active.recorder.log_metrics({_active.prefix + name: value for name, value in metrics.items()}, step)


def log_samples(name: str, rows: Sequence[Mapping[str, object]], step: int | None = None) -> None:
    """Record rows as a table, for example prompts, responses and their rewards; later steps are appended to it."""
    if _active and _active.recorder:
        _active.recorder.log_samples(name, rows, step)


def log_file(path: Path, folder: str | None = None) -> None:
    """Keep a copy of a file with the run, in a folder of its artifacts."""
    if _active and _active.recorder:
        _active.recorder.log_file(path, folder)


def current_checkpoints() -> Path | None:
    """The folder for this run's checkpoints; None where the stage is called as a plain function.

    It belongs to the stage's key, the hash of everything that it reads: what lies in it was written by an
    interrupted run of equal inputs, so it is right to go on from it. A finished run removes it.
    """
    return _active.checkpoints if _active else None
