"""Services that go away under runs: each run ends, nothing stays taken or running, and every number is there once.

Three projects report to one set of services, so that one disturbance meets three runs, each in another phase:

- computing: in `sft`, which holds the device;
- waiting: for the device;
- at the end: in the last stage that was asked for, so that what remains is to report.

The worker does one of them, as a deployment; the other two are `rlhf run` in a terminal. The matrix is {temporary,
standing} × {Prefect, MLflow, worker} × {killed −9, `down`, `down` and `up`} × the three phases. Left out, because they
cannot exist: a temporary MLflow or worker; `down` for a temporary server, which it does not know; waiting under a
temporary server, which has no limit `device` and is started after the wait for another run. `down` takes all
services at once, and ends the worker's run before `up` could matter to it. Prefect or MLflow killed is the same to a
run of the worker as to one of a terminal until it ends, so each is tried with the worker in one phase.
"""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest

from flows.services import free_port
from tests.pipeline.conftest import (
    PATIENCE,
    ROOT,
    STAGES,
    Project,
    WarmPython,
    is_dead,
    make_project,
    query,
    rlhf,
    wait_for,
)

pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(1200)]

ACTIVE = "('PENDING', 'RUNNING', 'PAUSED', 'CANCELLING')"
LOSSES = """
select runs.name, count(metrics.key) from runs left join metrics on metrics.run_uuid = runs.run_uuid
and metrics.key = 'loss' where runs.status = 'FINISHED' and runs.name != 'pipeline' group by runs.run_uuid
"""
WAITS = "waiting for the device"
TERMINAL_STAGES = {"waiting": ["sft"], "computing": [], "at the end": ["prepare"]}
HELD_IN = {"computing": "sft", "at the end": "prepare"}


@dataclass
class Fleet:
    """The project whose services they are, and two others that use them."""

    home: Project
    others: list[Project]
    ports: list[str]
    seed: int = 0

    @property
    def projects(self) -> list[Project]:
        return [self.home, *self.others]

    def up(self) -> None:
        rlhf(self.home, "up", "--prefect-port", self.ports[0], "--mlflow-port", self.ports[1])

    def kill(self, name: str) -> None:
        pid = self.home.services()[name]["pid"]
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: is_dead(pid))

    def begin(self, worker_phase: str) -> dict[str, subprocess.Popen[str]]:
        """Start the three runs, and return the terminals' once each is in its phase."""
        self.seed += 1
        others, terminals = iter(self.others), {}
        for phase in ("computing", "waiting", "at the end"):  # who computes must have the device before another waits
            project = self.home if phase == worker_phase else next(others)
            reset(project, self.seed, HELD_IN.get(phase))
            log = self.home.root / ".rlhf/services/worker.log"
            before = log.read_text().count(WAITS)
            if project is self.home:
                project.run_deployment("rlhf/nightly", stages=TERMINAL_STAGES[phase] or None)
            else:
                terminals[phase] = project.start("run", *TERMINAL_STAGES[phase])
            if phase != "waiting":
                project.wait_for(".rlhf/waiting")
            elif project is self.home:
                wait_for(partial(logged_more, log, before))
            else:
                output = terminals[phase].stdout
                assert output
                assert any(WAITS in line for line in output), "it ended instead of waiting"
        return terminals

    def release(self) -> None:
        for project in self.projects:
            (project.root / ".rlhf" / "go").touch()

    def active(self) -> list[object]:
        """The flow runs that Prefect takes for active."""
        return self.home.ask(f"select name, state_type from flow_run where state_type in {ACTIVE}")


def logged_more(log: Path, before: int) -> bool:
    return log.read_text().count(WAITS) > before


def reset(project: Project, seed: int, held_in: str | None) -> None:
    """Let every stage have something to do, and one wait inside."""
    state = project.root / ".rlhf"
    state.mkdir(exist_ok=True)
    for path in [*state.glob("*.resumable"), state / "go", state / "waiting"]:
        path.unlink(missing_ok=True)
    if held_in:
        (state / f"{held_in}.resumable").touch()
    params = project.root / "params.yaml"
    params.write_text(re.sub(r"^seed: \d+", f"seed: {seed}", params.read_text(), flags=re.MULTILINE))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, python: WarmPython) -> Iterator[Fleet]:
    folder, ports = tmp_path_factory.mktemp("fleet"), [str(free_port()), str(free_port())]
    own = {key: value for key, value in python.environment.items() if key != "PREFECT_API_URL"}
    servers = {
        "PREFECT_API_URL": f"http://127.0.0.1:{ports[0]}/api",
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{ports[1]}",
    }
    home = make_project(folder / "home", python, own)
    shutil.copy(ROOT / "prefect.yaml", home.root)
    others = [make_project(folder / name, python, own | servers) for name in ("one", "other")]
    found = Fleet(home, others, ports)
    try:
        found.up()
        yield found
    finally:
        for project in found.projects:
            project.kill()


def down(fleet: Fleet) -> None:
    assert rlhf(fleet.home, "down").strip() == "ended: worker, mlflow, prefect"
    assert fleet.home.processes() == []
    assert fleet.home.ask("select name from flow_run where deployment_id is not null and state_type in " + ACTIVE) == []


def down_and_up(fleet: Fleet) -> None:
    down(fleet)
    fleet.up()


ACTIONS: dict[str, Callable[[Fleet], None]] = {
    "Prefect killed": lambda fleet: fleet.kill("prefect"),
    "MLflow killed": lambda fleet: fleet.kill("mlflow"),
    "worker killed": lambda fleet: fleet.kill("worker"),
    "down": down,
    "down and up": down_and_up,
}


@pytest.mark.parametrize(
    ("action", "worker_phase"),
    [
        ("Prefect killed", "computing"),
        ("MLflow killed", "at the end"),
        *[("worker killed", phase) for phase in TERMINAL_STAGES],
        *[("down", phase) for phase in TERMINAL_STAGES],
        ("down and up", "computing"),
        ("down and up", "waiting"),
    ],
)
def test_standing(fleet: Fleet, action: str, worker_phase: str) -> None:
    terminals = fleet.begin(worker_phase)
    ACTIONS[action](fleet)
    fleet.release()
    for phase, process in terminals.items():
        output = process.communicate(timeout=PATIENCE)[0]
        assert process.returncode == 0, f"{phase}: {output}"
        assert "Traceback" not in output
        assert "urllib3" not in output
        assert output.count("warning: ") <= 2, f"one for Prefect and one for MLflow: {output}"
    fleet.up()
    wait_for(lambda: not [item for item in fleet.home.processes() if "prefect.engine" in item.cmdline()])
    check_whole(fleet)


def check_whole(fleet: Fleet) -> None:
    """The next commands find nothing taken and nothing running, and the same results everywhere."""
    following = [project.start("run") for project in fleet.projects]
    for process in following:
        output = process.communicate(timeout=PATIENCE)[0]
        assert process.returncode == 0, output
    wait_for(lambda: not fleet.active())
    assert fleet.home.ask("select name, active_slots from concurrency_limit_v2 where active_slots > 0") == []
    assert fleet.home.ask(f"select name from task_run where state_type in {ACTIVE}") == []
    store = fleet.home.root / "mlflow.db"
    assert query(store, "select name from runs where status not in ('FINISHED', 'KILLED')") == []
    assert {count for _, count in query(store, LOSSES)} == {1}
    for name in STAGES:
        results = {(project.root / f"artifacts/{name}/result/data.txt").read_bytes() for project in fleet.projects}
        assert len(results) == 1, f"{name} differs between projects"


def temporary_server(project: Project) -> psutil.Process:
    (server,) = [process for process in project.processes() if "flows.temporary_server" in process.cmdline()]
    return server


@pytest.mark.parametrize("phase", ["computing", "at the end"])
def test_temporary_prefect_is_killed(fleet: Fleet, tmp_path: Path, phase: str) -> None:
    project = make_project(tmp_path / "project", fleet.home.python, fleet.home.environment)
    reset(project, 1, HELD_IN[phase])
    process = project.start("run", *TERMINAL_STAGES[phase])
    project.wait_for(".rlhf/waiting")
    (mark,) = (project.root / ".rlhf" / "held").glob("flow.*")
    flow_run = mark.name.removeprefix("flow.")
    temporary_server(project).kill()
    (project.root / ".rlhf" / "go").touch()
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, output
    assert output.count("the run goes on without it") == 1
    assert "Traceback" not in output
    project.wait_for_end()
    runs = query(project.root / "mlflow.db", "select name, status from runs")
    assert {status for _, status in runs} == {"FINISHED"}
    rlhf(project, "run")
    database = Path(project.environment["PREFECT_HOME"], "prefect.db")
    ended = "select state_type from flow_run where id = ?"
    assert query(database, ended, flow_run) == [("CRASHED",)], "what could not report its end, the next run ends"
