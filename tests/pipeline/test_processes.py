"""How an error crosses a process, and how children end."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from flows import processes
from tasks.core.errors import DataError, StageError
from tests.pipeline.conftest import is_dead, wait_for

CHILD = """
import os, sys, time
from flows import processes
from tasks.core.errors import DataError
processes.die_with_parent()
with processes.report_errors():
    {body}
"""


def run(body: str, **options: float | Path) -> None:
    processes.run_python(["-c", CHILD.format(body=body)], "the child", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ("raise DataError('too few rows')", DataError, "^too few rows$"),
        ("raise RuntimeError('no such key')", StageError, "^the child: no such key; see .*child.log$"),
        (
            "os.environ['RANK'] = '1'; processes.write_error(RuntimeError('the first')); "
            "os.environ['RANK'] = '0'; raise DataError('it missed rank 1')",
            StageError,
            "^the child, rank 1: the first; see .*child.log$",
        ),
        (
            "print('out of memory', flush=True); os._exit(7)",
            StageError,
            "^the child: its process ended with status 7; see .*\nout of memory$",
        ),
    ],
    ids=["ours as itself", "another by its message", "the first of several", "none: status and last words"],
)
def test_an_error_crosses(body: str, kind: type[Exception], message: str, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "child.log"
    with pytest.raises(kind, match=message):
        run(body, log=log)
    assert ("Traceback" in log.read_text()) == ("RuntimeError('no such key')" in body)


def test_one_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"^the child was ended after 2 s, its time limit"):
        run("print(os.getpid(), flush=True); time.sleep(60)", timeout=2, log=tmp_path / "log")
    pid = (tmp_path / "log").read_text().partition("\n")[0]
    assert not pid or not psutil.pid_exists(int(pid))


def test_an_error_here_ends_the_children_of_other_threads() -> None:
    found: list[StageError] = []

    def work() -> None:
        try:
            run("time.sleep(60)")
        except StageError as error:
            found.append(error)

    def interrupted() -> None:
        with processes.children_terminated():
            thread.start()
            time.sleep(1)
            raise KeyboardInterrupt

    thread = threading.Thread(target=work)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    thread.join(20)
    assert len(found) == 1
    with pytest.raises(StageError, match="was not started"):
        run("pass")
    with processes.children_terminated():
        run("pass")


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    child = CHILD.format(body="open('pid', 'w').write(str(os.getpid())); time.sleep(60)")
    parent = f"from flows import processes; processes.run_python(['-c', {child!r}], 'x', cwd={str(tmp_path)!r})"
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    with subprocess.Popen([sys.executable, "-c", parent], env=environment) as process:
        wait_for(lambda: (tmp_path / "pid").exists() and bool((tmp_path / "pid").read_text()))
        process.kill()
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: is_dead(pid))


def test_a_home_that_cannot_be_written_is_replaced_for_libraries(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in processes.HOME_VARS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("MPLCONFIGDIR", "/chosen")
    monkeypatch.setenv("HOME", str(root))
    processes.use_writable_home()
    assert "PREFECT_HOME" not in os.environ
    monkeypatch.setenv("HOME", "/proc/nobody")
    processes.use_writable_home()
    assert Path(os.environ["PREFECT_HOME"]).is_relative_to(root / ".rlhf")
    assert Path(os.environ["PREFECT_HOME"]).is_dir()
    assert os.environ["MPLCONFIGDIR"] == "/chosen"
    for variable in processes.HOME_VARS:
        monkeypatch.delenv(variable)


END = """
import atexit, threading, time
from flows import processes
with processes.limit_exit_time():
    pass
processes.EXIT_SECONDS = 0.1
{first}
threading.Thread(target=time.sleep, args=[600]).start()
"""


@pytest.mark.parametrize(("first", "status"), [("processes.end_soon(0)", 0), ("", 1)], ids=["its own", "not known"])
def test_what_waits_at_the_end_is_not_waited_for(first: str, status: int) -> None:
    done = subprocess.run([sys.executable, "-c", END.format(first=first)], timeout=300, check=False)
    assert done.returncode == status
