"""Child processes that end with their parent, and whose errors reach it; and the lock of a project folder.

A child watches a pipe that its parent holds open, so it ends however the parent ended. The error that ends it goes as
JSON into a file that an environment variable names; where several processes share the file, the first to fail writes.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

import psutil
from filelock import FileLock, Timeout

from tasks.core import errors
from tasks.core.errors import RLHFError, StageError
from tasks.core.paths import project_root, state_dir
from tasks.core.terminal import tail

__all__ = [
    "ERROR_VARIABLE", "children_terminated", "die_with_parent", "end_soon", "limit_exit_time", "project_lock",
    "report_errors", "run_python", "spawn", "terminate_family", "use_writable_home", "write_error",
]  # fmt: skip

ERROR_VARIABLE = "RLHF_ERROR_FILE"
STOP_SECONDS = 30.0
EXIT_SECONDS = 7.0

# What libraries keep in the home folder, and the variables that name another place for it.
HOME_VARS = {"PREFECT_HOME": "prefect", "HF_HOME": "huggingface", "MPLCONFIGDIR": "matplotlib"}
HOME_VARS |= {"XDG_CACHE_HOME": "cache"}

_children: set[subprocess.Popen[bytes]] = set()
_stopping = threading.Event()
_ending = threading.Event()


def run_python(
    args: Sequence[str],
    label: str,
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
    timeout: float | None = None,
) -> None:
    """Run `python args…`, which must call `die_with_parent`, until it ends; on any error or signal here, end it.

    The error that it wrote is raised here, or a StageError where it was ended or failed without one.

    Args:
        label: names the process in errors.
        cwd: None for the project's folder.
        environment: None for this process's.
        log: where what it prints goes; None for where this process prints.
        timeout: seconds after which it is ended.
    """
    with tempfile.TemporaryDirectory(prefix="rlhf-") as folder, _open_log(log) as output:
        error_file = Path(folder) / "error.json"
        variables = {**(environment or os.environ), ERROR_VARIABLE: str(error_file)}
        child = spawn(args, cwd=cwd, environment=variables, output=output)
        _children.add(child)
        try:
            if _stopping.is_set():
                raise StageError(f"{label} was not started: its run is being ended")
            status = child.wait(timeout)
        except subprocess.TimeoutExpired:
            message = f"{label} was ended after {timeout:.0f} s, its time limit; it goes on from its checkpoint"
            raise StageError(message) from None
        finally:
            _terminate(child)
            _children.discard(child)
        if status and error_file.is_file():
            raise _read_error(error_file, label, log)
    if status:
        printed = tail(log) if log else "what it printed is above"
        raise StageError(f"{label}: its process ended with status {status}; {printed}")


def spawn(
    args: Sequence[str],
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    output: IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """Start `python args…` in a session of its own, with the pipe that `die_with_parent` watches."""
    return subprocess.Popen(
        [sys.executable, *args],
        cwd=cwd or project_root(),
        env=environment,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )


def _terminate(child: subprocess.Popen[bytes]) -> None:
    """Close the pipe, which interrupts the child; kill its whole session where it does not end."""
    assert child.stdin
    child.stdin.close()
    try:
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


@contextmanager
def children_terminated() -> Iterator[None]:
    """Terminate, on an error or a signal, every child that other threads of this process run, and let none start."""
    _stopping.clear()
    try:
        yield
    except BaseException:
        _stopping.set()
        stoppers = [threading.Thread(target=_terminate, args=[child]) for child in list(_children)]
        for stopper in stoppers:
            stopper.start()
        for stopper in stoppers:
            stopper.join()
        raise


def use_writable_home() -> None:
    """Let libraries write into the project's folder of local state where they cannot write into the home folder."""
    if not os.access(Path.home(), os.W_OK):
        for variable, name in HOME_VARS.items():
            folder = state_dir() / "home" / name
            folder.mkdir(parents=True, exist_ok=True)
            os.environ.setdefault(variable, str(folder))


def terminate_family(family: Sequence[psutil.Process], seconds: float) -> None:
    """Terminate the first of some processes, none of which need be a child; then the others; then kill what is left."""
    family = list(family)
    for number, members in ((signal.SIGTERM, family[:1]), (signal.SIGTERM, family), (signal.SIGKILL, family)):
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(number)
        _, family = psutil.wait_procs(family, seconds)


def end_soon(status: int) -> None:
    """Let the end of this process take a few seconds at most, and then be of the status that was said first.

    Prefect sends its last events and logs when the interpreter ends, and tries for minutes if its server is away.
    """
    if _ending.is_set():
        return
    _ending.set()
    timer = threading.Timer(EXIT_SECONDS, _end, [status])
    timer.daemon = True
    timer.start()


def _end(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


@contextmanager
def limit_exit_time() -> Iterator[None]:
    """Let the process that does this work, and that we may not have started, end soon once it wants to end."""
    try:
        yield
    finally:
        # After those of Prefect, so called before them. They wait before `atexit` has its turn.
        threading._register_atexit(end_soon, 1)  # type: ignore[attr-defined]


def die_with_parent() -> None:
    """Interrupt this process, a child, when its parent is gone, and kill it if it does not end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    threading.Thread(target=_watch_parent, daemon=True).start()


def _watch_parent() -> None:
    os.read(0, 1)  # not by sys.stdin, whose lock Python wants when it ends
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(STOP_SECONDS)
    os.killpg(0, signal.SIGKILL)


@contextmanager
def report_errors() -> Iterator[None]:
    """Pass the error that ends this process, a child, to its parent; without a traceback if a user can cure it."""
    try:
        yield
    except Exception as error:
        write_error(error)
        if not isinstance(error, RLHFError):
            raise
        sys.exit(1)


def write_error(error: Exception) -> None:
    """Write the error for the parent, in a process that `run_python` started; elsewhere do nothing."""
    if path := os.environ.get(ERROR_VARIABLE):
        content = {"error": str(error), "kind": type(error).__name__, "rank": os.environ.get("RANK")}
        with contextlib.suppress(FileExistsError), open(path, "x", encoding="utf-8") as file:
            json.dump(content, file)


def _read_error(path: Path, label: str, log: Path | None) -> RLHFError:
    content = json.loads(path.read_text(encoding="utf-8"))
    if kind := getattr(errors, content["kind"], None):
        error: RLHFError = kind(content["error"])
        return error
    rank = f", rank {content['rank']}" if content.get("rank") else ""
    return StageError(f"{label}{rank}: {content['error']}" + (f"; see {log}" if log else ""))


def _open_log(log: Path | None) -> contextlib.AbstractContextManager[IO[bytes] | None]:
    if log is None:
        return contextlib.nullcontext()
    log.parent.mkdir(parents=True, exist_ok=True)
    return log.open("wb")


@contextmanager
def project_lock(on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold the project's lock, after other runs have released it; re-entrant.

    A second run could change params.yaml between two stages of the first. The lock ends with its process.

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
