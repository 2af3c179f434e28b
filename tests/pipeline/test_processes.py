"""How an error crosses a process, and how children end."""

from __future__ import annotations

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
from tests.pipeline.conftest import wait_for

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


def test_an_error_of_ours_crosses_as_itself() -> None:
    with pytest.raises(DataError, match=r"^too few rows$"):
        run("raise DataError('too few rows')")


def test_another_error_is_named_and_its_traceback_is_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "child.log"
    with pytest.raises(StageError, match=f"^the child: no such key; see {log}$"):
        run("raise RuntimeError('no such key')", log=log)
    assert "Traceback" in log.read_text()


def test_of_several_processes_the_first_to_fail_is_heard() -> None:
    with pytest.raises(StageError, match=r"^the child, rank 1: the first$"):
        run(
            "os.environ['RANK'] = '1'; processes.write_error(RuntimeError('the first')); "
            "os.environ['RANK'] = '0'; raise DataError('it missed rank 1')"
        )


def test_one_that_ends_without_an_error_gives_its_status_and_last_words(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"^the child: its process ended with status 7; see .*\nout of memory$"):
        run("print('out of memory', flush=True); os._exit(7)", log=tmp_path / "log")


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
    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
