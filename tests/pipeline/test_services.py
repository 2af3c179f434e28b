"""`rlhf up` and `rlhf down`: real servers and a real worker in a project of toy stages."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from tests.pipeline.conftest import Project, is_dead, query, rlhf, wait_for

pytestmark = pytest.mark.slow

EVERY_FIVE_SECONDS = '"* * * * * */5"'

RUNS = """
select flow_run.state_name, flow_run.start_time, flow_run.end_time from flow_run
where flow_run.deployment_id is not null and flow_run.start_time is not null order by flow_run.start_time
"""


def test_a_run_uses_them(standing: Project) -> None:
    output = rlhf(standing, "run")
    assert "temporary" not in output
    assert len(standing.ran()) == 4
    runs = query(standing.root / "mlflow.db", "select name from runs")
    assert sorted(name for (name,) in runs) == ["collect", "gold_judge", "pipeline", "prepare", "sft"]


def test_up_again_starts_nothing_but_what_is_gone(standing: Project) -> None:
    before = standing.services()
    os.kill(before["worker"]["pid"], signal.SIGKILL)
    wait_for(lambda: is_dead(before["worker"]["pid"]))
    rlhf(standing, "up")
    after = standing.services()
    assert after["prefect"] == before["prefect"]
    assert after["mlflow"] == before["mlflow"]
    assert psutil.Process(after["worker"]["pid"]).is_running()


def test_what_a_killed_launcher_leaves_is_ended(standing: Project) -> None:
    """By `up`, which needs its port, and by `down`."""
    left = kill_launcher(standing)
    rlhf(standing, "up", "--mlflow-port", port_of(standing.services()["mlflow"]))
    wait_for(lambda: all(is_dead(pid) for pid in left))
    assert psutil.Process(standing.services()["mlflow"]["pid"]).is_running()
    left = kill_launcher(standing)
    ports = [port_of(standing.services()[name]) for name in ("prefect", "mlflow")]
    assert "ended: worker, mlflow, prefect" in rlhf(standing, "down")
    assert all(is_dead(pid) for pid in left)
    rlhf(standing, "up", "--prefect-port", ports[0], "--mlflow-port", ports[1])


def kill_launcher(project: Project) -> list[int]:
    """Kill the process that started MLflow's server, and return what it has started."""
    launcher = psutil.Process(project.services()["mlflow"]["pid"])
    left = [child.pid for child in launcher.children(recursive=True)]
    assert left
    launcher.kill()
    wait_for(lambda: is_dead(launcher.pid))
    assert not any(is_dead(pid) for pid in left)
    return left


def port_of(row: dict[str, Any]) -> str:
    return str(urlsplit(row["address"]).port)


LAST_RUNS = "select name, status from runs where start_time >= ? and name in ('pipeline', 'sft')"


def family(project: Project) -> set[int]:
    """Every process that works in the project, and what the services have started elsewhere."""
    roots = [*project.processes(), *(psutil.Process(row["pid"]) for row in project.services().values())]
    return {member.pid for root in roots for member in [root, *root.children(recursive=True)]}


@pytest.mark.fault("Prefect cancels the run of a deployment", "the next run goes on from the checkpoint")
@pytest.mark.parametrize("parallel", [0, 2], ids=["in the flow's process", "in its own"])
def test_a_cancelled_run_leaves_nothing_behind(standing: Project, parallel: int) -> None:
    rlhf(standing, "run")
    standing.ran()
    before, state = family(standing), standing.root / ".rlhf"
    (state / "sft.resumable").touch()
    (state / "waiting").unlink(missing_ok=True)
    (standing.root / "requirements.lock").write_text(f"toy=={parallel + 2}\n")
    address = standing.services()["prefect"]["address"]
    begun = str(int(time.time() * 1000))
    run = standing.run_deployment("rlhf/nightly", parallel=parallel)
    standing.wait_for(".rlhf/waiting")
    lock = standing.lock()
    with standing.prefect() as client:
        assert client.read_global_concurrency_limit_by_name("device").active_slots == 1
    command = [sys.executable, "-m", "prefect", "flow-run", "cancel", str(run)]
    subprocess.run(command, env=standing.environment | {"PREFECT_API_URL": address}, check=True, capture_output=True)
    standing.wait_for_state(run, "Cancelled")
    wait_for(lambda: family(standing) == before)
    with standing.prefect() as client:
        assert client.read_global_concurrency_limit_by_name("device").active_slots == 0
    assert standing.lock() == lock
    assert "sft" in standing.dvc("status")
    runs = dict(query(standing.root / "mlflow.db", LAST_RUNS, begun))
    assert runs == {"pipeline": "KILLED", "sft": "KILLED"}
    assert "waiting for the device" not in standing.check_resumed(partial(rlhf, standing))
    assert "up to date" in standing.dvc("status")
    (state / "sft.resumable").unlink()


def test_the_cron_deployment_runs_and_never_twice_at_once(standing: Project) -> None:
    """Each run takes 12 s and falls due every 5."""
    standing.edit("prefect.yaml", '"0 2 * * *"', EVERY_FIVE_SECONDS)
    state = standing.root / ".rlhf"
    (state / "sleep").write_text("3")
    standing.edit("tasks/shared.py", '"a"', '"b"')
    rlhf(standing, "up")
    wait_for(lambda: sum(name == "Completed" for name, _, _ in standing.ask(RUNS)) >= 2)
    standing.edit("prefect.yaml", EVERY_FIVE_SECONDS, '"0 2 * * *"')
    (state / "sleep").unlink()
    rlhf(standing, "up")
    assert standing.ran() == ["collect", "prepare", "sft", "gold_judge"], "the second run found all done"
    spans = [[datetime.fromisoformat(time) for time in row[1:] if time] for row in standing.ask(RUNS)]
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans) if len(one) == 2)


@pytest.mark.fault("`rlhf down` during a run", "the next run goes on from the checkpoint")
def test_down_ends_everything_and_a_run_that_is_going_on(standing: Project) -> None:
    state = standing.root / ".rlhf"
    (state / "sft.resumable").touch()
    (state / "waiting").unlink(missing_ok=True)
    standing.edit("params.yaml", "epochs: 1", "epochs: 3")
    begun = str(int(time.time() * 1000))
    standing.run_deployment("rlhf/nightly")
    standing.wait_for(".rlhf/waiting")
    output = rlhf(standing, "down")
    assert output.strip() == "ended: worker, mlflow, prefect"
    assert standing.processes() == []
    assert dict(query(standing.root / "mlflow.db", LAST_RUNS, begun)) == {"pipeline": "KILLED", "sft": "KILLED"}
    assert "nothing was up" in rlhf(standing, "down")
    assert "temporary" in standing.check_resumed(partial(rlhf, standing))


def test_a_port_that_is_taken_is_one_message(fresh: Project) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        output = rlhf(fresh, "up", "--prefect-port", str(port), expect=1)
    assert f"port {port} for prefect is taken" in output
    assert f"--prefect-port {port + 1}" in output
    assert fresh.processes() == []
