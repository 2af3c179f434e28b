"""The MLflow store: where it is, its server's command, opening it, and a queue of writes while its server is away.

MLflow takes seconds to import, so it is imported when it is needed and not before.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from filelock import FileLock, Timeout

from tasks.core.errors import ConfigError, first_line
from tasks.core.paths import project_root, state_dir
from tasks.runtime.mlflow_view import VIEW_TAG, pipelines_view

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = [
    "EXPERIMENT_ID_VAR", "QueuedRun", "flush_stale", "is_unavailable", "open_store", "queued", "server_command",
    "store_uri", "warn",
]  # fmt: skip

EXPERIMENT = "rlhf"
# The experiment that a flow passes to its stages, since the server may be away when they begin.
EXPERIMENT_ID_VAR = "RLHF_EXPERIMENT_ID"

LOCKED = "database is locked"  # SQLite's words
LOCKED_SECONDS = 120.0  # for so long a command waits for another program to unlock the store

MLFLOW_ENV = {
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Files go through the server: the address under which it knows its store need not exist here.
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def store_uri() -> str:
    """Address of the store of runs: `$MLFLOW_TRACKING_URI`, else mlflow.db in the project."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{project_root() / 'mlflow.db'}"


def server_command(port: int) -> tuple[list[str], dict[str, str]]:
    """Command and environment of MLflow's server on loopback; one worker and no job runner make it start fast."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store_uri()]
    command += ["--artifacts-destination", str(project_root() / "mlartifacts")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return command, {**os.environ, **MLFLOW_ENV, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def open_store() -> tuple[MlflowClient, str]:
    """A client for the store, and the experiment, made on first use; a ConfigError if the store cannot be opened."""
    for variable, value in MLFLOW_ENV.items():
        os.environ.setdefault(variable, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it prints what it then raises
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # each retry; `warn` says it once
    from mlflow import MlflowClient, set_tracking_uri

    uri = store_uri()
    # Files of a run are found by `runs:/…`, which MLflow resolves against its global URI.
    set_tracking_uri(uri)
    if known := os.environ.get(EXPERIMENT_ID_VAR):  # the flow has opened it, and the server may be away by now
        return MlflowClient(uri), known
    state_dir().mkdir(exist_ok=True)
    # Two processes that open a new store at once would both create its tables. And a local store makes a folder
    # `mlruns` in the working directory, used or not.
    with FileLock(state_dir() / "mlflow.lock"), contextlib.chdir(state_dir()):
        return _open_experiment(uri)


def _open_experiment(uri: str) -> tuple[MlflowClient, str]:
    """Open the experiment, or make it; a database that another program has locked is waited for."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    folder = (project_root() / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
    deadline, waiting = time.monotonic() + LOCKED_SECONDS, False
    if Path(uri.removeprefix("sqlite:///")).is_dir():  # which MLflow would try to open for minutes
        raise _store_error(uri, "it is a folder")
    while True:
        try:
            client = MlflowClient(uri)
            found = client.get_experiment_by_name(EXPERIMENT)
            experiment = str(found.experiment_id if found else client.create_experiment(EXPERIMENT, folder))
            if not found or VIEW_TAG not in found.tags:  # a view that somebody has changed stays
                client.set_experiment_tag(experiment, VIEW_TAG, pipelines_view())
            return client, experiment
        except (MlflowException, SQLAlchemyError) as error:
            if LOCKED not in str(error) or time.monotonic() > deadline:
                raise _store_error(uri, first_line(error)[:SHOWN]) from error
            if not waiting:
                warn(f"another program has locked it; waiting up to {LOCKED_SECONDS:.0f} s")
            waiting = True
            time.sleep(1)


def _store_error(uri: str, reason: str) -> ConfigError:
    return ConfigError(
        f"the MLflow store {uri} cannot be opened; check MLFLOW_TRACKING_URI, or move a file that is no database out "
        f"of the way: {reason}"
    )


def is_unavailable(error: Exception) -> bool:
    """Whether the error is that of a server that does not answer or is overloaded, or of a locked database."""
    from mlflow.exceptions import MlflowException

    if not store_uri().startswith("http"):
        return LOCKED in str(error)
    if isinstance(error, MlflowException):
        status = int(error.get_http_status_code())  # type: ignore[no-untyped-call]
        return status >= 500 or error.error_code == "REQUEST_LIMIT_EXCEEDED"
    return isinstance(error, OSError)


# -- writes while the server is away ---------------------------------------------------------------------------

RETRY_SECONDS = 30.0  # for so long a server that was away is not tried again
SHOWN = 200  # characters of an error

Arguments = ParamSpec("Arguments")
AnyRun = TypeVar("AnyRun", bound="QueuedRun")

_writes: dict[str, Callable[..., None]] = {}
_warned: set[Path] = set()


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

    Each is made at least once. The file's lock is held until the queue is closed.

    Attributes:
        time: when the call that is being made was submitted, in milliseconds.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, FileLock(file.with_suffix(".lock"))
        self._waiting = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self._last_attempt, self.time = 0.0, 0

    def submit(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make a call now, or keep it for later; raises what it raised, unless that means that the server is away."""
        line = json.dumps([name, int(time.time() * 1000), args, kwargs], default=str)
        if self._waiting and time.monotonic() - self._last_attempt > RETRY_SECONDS:
            self.flush()
        if not self._waiting:
            if (error := self._try(line)) is None:
                return
            self._start_queueing(error)
        self._waiting.append(line)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def flush(self) -> bool:
        """Make the calls that wait; returns whether none is left.

        The file is written once, at the end: a process that is killed meanwhile leaves all of them to be made again.
        """
        self._last_attempt, made = time.monotonic(), 0
        try:
            while made < len(self._waiting) and self._try(self._waiting[made]) is None:
                made += 1
        finally:
            self._waiting = self._waiting[made:]
            self._save()
        if self._waiting:
            return False
        if self._lock.is_locked:
            self._lock.release()
            Path(self._lock.lock_file).unlink(missing_ok=True)
        return True

    def close(self) -> bool:
        """Make the calls that wait, or leave them to `flush_stale`; returns whether none is left."""
        if self.flush():
            return True
        self._lock.release()
        return False

    def _try(self, line: str) -> Exception | None:
        """Make a call; return the error where the server is away."""
        try:
            self._call(line)
        except Exception as error:
            if not is_unavailable(error):
                raise
            return error
        return None

    def _call(self, line: str) -> None:
        name, self.time, args, kwargs = json.loads(line)
        _writes[name](self, *args, **kwargs)

    def _start_queueing(self, error: Exception) -> None:
        self._last_attempt = time.monotonic()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        folder = self._file.parent
        if folder not in _warned:  # once for all runs of this process
            why = first_line(error)[:SHOWN]
            warn(f"away or locked, so what it should record is kept in {folder} until it is back ({why})")
        _warned.add(folder)

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
        except ConfigError:  # the store went away: they wait
            return
        except Exception as error:
            aside = file.rename(file.with_suffix(".refused"))
            warn(f"refuses what an earlier run left in {aside} ({first_line(error)[:SHOWN]})")
        lock.unlink(missing_ok=True)


def warn(text: str) -> None:
    print(f"warning: MLflow at {store_uri()}: {text}", file=sys.stderr)
