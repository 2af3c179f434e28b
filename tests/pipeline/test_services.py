"""`rlhf up` and `rlhf down`: real servers and a real worker in a project of toy stages."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests.pipeline.conftest import ROOT, free_port, make_project, wait_for

if TYPE_CHECKING:
    from tests.pipeline.conftest import Project, WarmPython

pytestmark = pytest.mark.slow

EVERY_FIVE_SECONDS = '"* * * * * */5"'

RUNS = """
select flow_run.state_name, flow_run.start_time, flow_run.end_time from flow_run
where flow_run.deployment_id is not null and flow_run.start_time is not null order by flow_run.start_time
"""


def ask(project: Project, question: str) -> list[tuple[Any, ...]]:
    """What the standing server's database says."""
    path = project.root / ".rlhf" / "services" / "prefect" / "prefect.db"
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        return database.execute(question).fetchall()
    finally:
        database.close()


def rlhf(project: Project, *words: str, expect: int = 0) -> str:
    return project.command(sys.executable, "-m", "flows.cli", *words, expect=expect)


@pytest.fixture(scope="module")
def standing(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], python: WarmPython
) -> Iterator[Project]:
    """A finished project with its services up; whatever happens, none of them stays behind."""
    own = {key: value for key, value in environment.items() if key != "PREFECT_API_URL"}
    project = make_project(tmp_path_factory.mktemp("standing") / "project", own, python)
    (project.root / "prefect.yaml").write_bytes((ROOT / "prefect.yaml").read_bytes())
    try:
        said = rlhf(project, "up", "--prefect-port", str(free_port()), "--mlflow-port", str(free_port()))
        assert "`rlhf down` ends them" in said
        yield project
    finally:
        for member in project.processes():
            member.kill()


def services(project: Project) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((project.root / ".rlhf/services/services.json").read_text())}


def test_a_run_uses_them(standing: Project) -> None:
    said = rlhf(standing, "run")
    assert "temporary" not in said
    assert len(standing.ran()) == 4
    runs = sqlite3.connect(standing.root / "mlflow.db").execute("select name from runs").fetchall()
    assert sorted(name for (name,) in runs) == ["collect", "gold_judge", "pipeline", "prepare", "sft"]


def test_up_again_starts_nothing_but_what_is_gone(standing: Project) -> None:
    before = services(standing)
    os.kill(before["worker"]["pid"], signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(before["worker"]["pid"]) or _is_dead(before["worker"]["pid"]), seconds=30)
    rlhf(standing, "up")
    after = services(standing)
    assert after["prefect"] == before["prefect"]
    assert after["mlflow"] == before["mlflow"]
    assert psutil.Process(after["worker"]["pid"]).is_running()


def test_the_cron_deployment_runs_and_never_twice_at_once(standing: Project) -> None:
    """Each run takes 12 s and falls due every 5."""
    standing.edit("prefect.yaml", '"0 2 * * *"', EVERY_FIVE_SECONDS)
    state = standing.root / ".rlhf"
    (state / "sleep").write_text("3")
    standing.edit("tasks/shared.py", '"a"', '"b"')
    rlhf(standing, "up")
    standing.wait_until(lambda: sum(name == "Completed" for name, _, _ in ask(standing, RUNS)) >= 2)
    standing.edit("prefect.yaml", EVERY_FIVE_SECONDS, '"0 2 * * *"')
    (state / "sleep").unlink()
    rlhf(standing, "up")
    assert standing.ran() == ["collect", "prepare", "sft", "gold_judge"], "the second run found all done"
    spans = [[datetime.fromisoformat(time) for time in row[1:] if time] for row in ask(standing, RUNS)]
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans) if len(one) == 2)


def test_down_ends_everything_and_a_run_that_is_going_on(standing: Project) -> None:
    state = standing.root / ".rlhf"
    (state / "sft.resumable").touch()
    standing.edit("params.yaml", "epochs: 1", "epochs: 3")
    address = services(standing)["prefect"]["address"]
    command = [sys.executable, "-m", "prefect", "deployment", "run", "rlhf/nightly"]
    subprocess.run(command, env=standing.environment | {"PREFECT_API_URL": address}, check=True, capture_output=True)
    standing.wait_for(".rlhf/waiting")
    said = rlhf(standing, "down")
    assert said.strip() == "ended: worker, mlflow, prefect"
    assert standing.processes() == []
    assert "nothing was up" in rlhf(standing, "down")
    standing.ran()
    assert "temporary" in rlhf(standing, "run")
    assert standing.ran() == ["sft"]
    assert (state / "resumed").read_text() == "True"


def test_a_port_that_is_taken_is_one_message(fresh: Project) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        said = rlhf(fresh, "up", "--prefect-port", str(port), expect=1)
    assert f"port {port} for prefect is taken" in said
    assert f"--prefect-port {port + 1}" in said
    assert "Traceback" not in said
    assert fresh.processes() == []


def _is_dead(pid: int) -> bool:
    time.sleep(0.1)
    return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
