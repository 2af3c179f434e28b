"""The project as DVC has it: opening it, loading a stage, the stage's key, and DVC's errors in our words."""

from __future__ import annotations

import errno
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dvc.stage.cache
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.stage.exceptions import StageNotFound

from tasks.core.errors import StageError
from tasks.core.paths import project_root

__all__ = [
    "describe_error",
    "dvc_errors",
    "error_chain",
    "load_stage",
    "open_repo",
    "quiet_logger",
    "remote_error",
    "remote_errors",
    "run_cache_key",
]

MIN_FREE_BYTES = 2**20  # free bytes below which a disk counts as full: DVC's own message may blame something else


def open_repo() -> Repo:
    """The DVC project of the working directory; it takes no lock."""
    quiet_logger()
    return Repo(str(project_root()))


def load_stage(repo: Any, name: str) -> Any:
    """A stage of dvc.yaml, as DVC has loaded it.

    Raises:
        StageError: there is none of this name.
    """
    try:
        return repo.stage.load_one(str(project_root() / "dvc.yaml"), name)
    except StageNotFound as error:
        known = ", ".join(stage.addressing for stage in repo.index.stages)
        raise StageError(f"dvc.yaml has no stage {name!r}; its stages are {known}") from error


def run_cache_key(stage: Any) -> str | None:
    """The hash of everything that a loaded stage reads, as the run-cache has it; None while an input does not exist."""
    private: Any = dvc.stage.cache
    try:
        can_hash, get_hash = private._can_hash, private._get_stage_hash
    except AttributeError as error:
        raise StageError("the stage hash moved in this version of DVC; install dvc>=3.67,<4 as pinned") from error
    if not all(dep.exists for dep in stage.deps):
        return None
    stage.save_deps()
    return str(get_hash(stage)) if can_hash(stage) else None


@contextmanager
def dvc_errors(where: str) -> Iterator[None]:
    """Raise what DVC raises as a StageError that says where."""
    try:
        yield
    except DvcException as error:
        raise StageError(f"{where}: {describe_error(error)}") from error


@contextmanager
def remote_errors(what: str) -> Iterator[None]:
    """Raise what the library of a DVC remote raises as a StageError; `what`: read or written."""
    try:
        yield
    except (DvcException, StageError):
        raise
    except Exception as error:
        raise remote_error(what, error) from error


def remote_error(what: str, error: Exception) -> StageError:
    """What to raise for whatever the remote's own library has raised."""
    missing = re.search("requires '(dvc-[a-z0-9]+)'", str(error))
    cure = f"; pip install -c requirements.lock {missing[1]}" if missing else ""
    return StageError(f"the DVC remote cannot be {what}: {type(error).__name__}: {error}{cure}")


def error_chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, the origin last."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__


def describe_error(error: BaseException) -> str:
    """The origin of an error of DVC, in words that say what to do."""
    last = list(error_chain(error))[-1]
    full = isinstance(last, OSError) and last.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or shutil.disk_usage(project_root()).free < MIN_FREE_BYTES:
        return "no space left on the disk for its outputs, so none were recorded: free some, then run again"
    if isinstance(last, FileNotFoundError) and last.filename:
        return f"{last.filename} does not exist; if the DVC remote has it, `rlhf run --pull` fetches it"
    return str(last)


def quiet_logger() -> None:
    """Let DVC print warnings and errors only, and those once.

    It installs its own handlers when imported: what also reached the root logger would be printed twice, and what it
    tells a person at its own command line (INFO) is not for ours.
    """
    for name in ("dvc", "dvc_data", "dvc_objects"):
        logging.getLogger(name).propagate = False
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("dvc.output").addFilter(_hide_empty_output_warning)


def _hide_empty_output_warning(record: logging.LogRecord) -> bool:
    """An output may well be empty: no row was malformed, or the stage is off."""
    return not record.getMessage().endswith("is empty.")
