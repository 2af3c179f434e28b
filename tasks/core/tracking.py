"""Log metrics, tables and files of the current stage run, and find its checkpoint folder.

Stages import this module, so it knows no vendor: `tasks.runtime.stage_runner` attaches a recorder, and how runs are
recorded can change without any stage running again. Without a recorder (a unit test) every function does nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

__all__ = [
    "ActiveRun", "Recorder", "active_run", "checkpoint_dir", "log_file", "log_metrics", "log_samples", "prefixed",
]  # fmt: skip


class Recorder(Protocol):
    """Receiver of a run's metrics, tables and files."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None) -> None: ...

    def log_samples(self, name: str, rows: Sequence[Mapping[str, object]], step: int | None) -> None: ...

    def log_file(self, path: Path, folder: str | None) -> None: ...


@dataclass(frozen=True)
class ActiveRun:
    """The current stage run of this process."""

    stage: str
    recorder: Recorder | None = None
    checkpoints: Path | None = None
    prefix: str = ""


# Not a ContextVar: stages run one after another, and threads that a trainer starts must find the run as well.
_active: ActiveRun | None = None


@contextmanager
def active_run(run: ActiveRun) -> Iterator[None]:
    """Make this the current run of the functions below."""
    global _active
    previous, _active = _active, run
    try:
        yield
    finally:
        _active = previous


@contextmanager
def prefixed(name: str) -> Iterator[None]:
    """Prefix metrics and checkpoint folders with a name: for one of several models of a stage."""
    if _active is None:
        yield
        return
    checkpoints = _active.checkpoints / name if _active.checkpoints else None
    with active_run(replace(_active, checkpoints=checkpoints, prefix=f"{name}/")):
        yield


def log_metrics(metrics: Mapping[str, float], step: int | None = None) -> None:
    """Log metrics, at a step if they belong to a curve."""
    if _active and _active.recorder:
        _active.recorder.log_metrics({_active.prefix + name: value for name, value in metrics.items()}, step)


def log_samples(name: str, rows: Sequence[Mapping[str, object]], step: int | None = None) -> None:
    """Log rows as a table, for example prompts, responses and their rewards; later steps are appended."""
    if _active and _active.recorder:
        _active.recorder.log_samples(name, rows, step)


def log_file(path: Path, folder: str | None = None) -> None:
    """Log a copy of a file to a folder of the run's artifacts."""
    if _active and _active.recorder:
        _active.recorder.log_file(path, folder)


def checkpoint_dir() -> Path | None:
    """The folder for this run's checkpoints; None where the stage is called as a plain function.

    It belongs to the stage's key, so what lies in it was written by an interrupted run of equal inputs. A finished run
    removes it.
    """
    return _active.checkpoints if _active else None
