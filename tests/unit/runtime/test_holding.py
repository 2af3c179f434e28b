"""Marks of what a process holds: locked as long as it lives, however it ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from tasks.runtime import holding

HOLDER = """
import sys, time
from tasks.runtime import holding
with holding.hold("run", "one"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_mark_is_abandoned_only_when_its_process_is_gone(root: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        assert holding.abandoned("run") == []
        process.kill()
    assert holding.abandoned("run") == ["one"]
    assert holding.abandoned("other") == []
    holding.forget("run", "one")
    assert holding.abandoned("run") == []


FLOW = """
from flows.prefect_runs import FLOW_MARK, hold_flow_run
from tasks.runtime import holding
hold_flow_run("one")
print(holding.abandoned(FLOW_MARK))
"""


def test_a_flow_run_is_held_beyond_its_function_until_the_process_ends(root: Path) -> None:
    """Between the two Prefect reports that it has ended; another command must not call it crashed."""
    done = subprocess.run([sys.executable, "-c", FLOW], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert holding.abandoned("flow") == ["one"]


def test_a_mark_outlives_its_release_until_somebody_has_ended_what_it_names(root: Path) -> None:
    with holding.hold("run", "one"):
        assert holding.abandoned("run") == [], "this process is one that lives, too"
    assert holding.abandoned("run") == ["one"]


def test_a_mark_that_is_forgotten_while_it_is_held_is_gone(root: Path) -> None:
    with holding.hold("run", "one"):
        holding.forget("run", "one")
    assert holding.abandoned("run") == []


def test_the_marks_of_a_worktree_are_where_its_removal_leaves_them(
    root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("project")
    monkeypatch.setenv(holding.MARKS_VAR, str(elsewhere))
    with holding.hold("run", "one"):
        assert [path.name for path in elsewhere.iterdir()] == ["run.one"]
