"""`rlhf schedule` and prefect.yaml: what falls due runs as `rlhf run` would, and nothing outlives the command."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prefect.flows import load_flow_from_entrypoint
from ruamel.yaml import YAML

from flows.pipeline import pipeline
from flows.retrain import retrain
from flows.schedule import next_fire_times
from flows.services import deployment_name
from tests.pipeline.conftest import PATIENCE, ROOT, Project, query, wait_for

pytestmark = pytest.mark.slow

# Seconds stand in Prefect's cron after the weekday.
EVERY_FIVE_SECONDS = "* * * * * */5"

RUNS = """
select flow_run.state_name from flow_run join deployment on deployment.id = flow_run.deployment_id
where deployment.name = 'nightly' and flow_run.start_time is not null order by flow_run.start_time
"""
WAITING = """
select count(*) from flow_run join deployment on deployment.id = flow_run.deployment_id
where deployment.name = 'nightly' and flow_run.state_type = 'SCHEDULED'
and flow_run.next_scheduled_start_time > datetime('now')
"""


@contextmanager
def serving(project: Project) -> Iterator[subprocess.Popen[str]]:
    """The project on a schedule; killed if the test fails."""
    shutil.copy(ROOT / "prefect.yaml", project.root)
    environment = {key: value for key, value in project.environment.items() if key != "PREFECT_API_URL"}
    process = project.start("schedule", EVERY_FIVE_SECONDS, environment=environment)
    try:
        yield process
    finally:
        project.kill()
        process.communicate()


def runs(project: Project) -> list[tuple[Any, ...]]:
    """The states of the runs that began, the oldest first."""
    started = project.root / ".rlhf" / "services" / "services.json"
    return project.ask(RUNS) if started.exists() and "worker" in started.read_text() else []


def test_what_falls_due_runs_to_its_end(project: Project) -> None:
    """Red here, and nothing in any log of ours: Prefect's scheduler has stopped working with some newer library.

    Known: with Prefect 3.8.8 no schedule ever fires under sqlalchemy 2.1.
    """
    with serving(project) as process:
        wait_for(lambda: ("Completed",) in runs(project))
        os.kill(process.pid, signal.SIGTERM)
        output = process.communicate(timeout=PATIENCE)[0]
        project.wait_for_end()
    assert process.returncode == 0, output
    assert "next runs: " in output
    assert "✓ gold_judge cached" in " ".join((project.root / ".rlhf/services/worker.log").read_text().split())
    assert project.ask(WAITING) == [(0,)], "stopped, and yet runs are planned"


def test_ctrl_c_ends_the_run_and_every_process(project: Project) -> None:
    """As a terminal sends it, to the whole group."""
    (project.root / ".rlhf" / "sft.resumable").touch()
    project.edit("params.yaml", "epochs: 1", "epochs: 3")
    with serving(project) as process:
        project.wait_for(".rlhf/waiting")
        os.killpg(process.pid, signal.SIGINT)
        output = process.communicate(timeout=PATIENCE)[0]
        project.wait_for_end()
    assert process.returncode == 0, output
    assert "Traceback" not in output
    assert project.ask(RUNS) == [("Cancelled",)], "one run at a time, and that one cancelled"
    newest = query(project.root / "mlflow.db", "select name, status from runs order by start_time desc limit 2")
    assert sorted(newest) == [("pipeline", "KILLED"), ("sft", "KILLED")]
    project.check_resumed()


SCHEDULES = """
select json_extract(schedule, '$.cron') from deployment_schedule
join deployment on deployment.id = deployment_schedule.deployment_id where deployment.name = 'nightly'
"""


def test_services_that_are_up_are_used_and_stay_up(standing: Project) -> None:
    """With the schedule of before."""
    before = standing.services()
    process = standing.start("schedule", EVERY_FIVE_SECONDS)
    try:
        wait_for(lambda: ("Completed",) in standing.ask(RUNS))
        assert standing.ask(SCHEDULES) == [(EVERY_FIVE_SECONDS,)]
        os.kill(process.pid, signal.SIGINT)
        output = process.communicate(timeout=PATIENCE)[0]
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, output
    assert "the services have the schedule of before" in output
    assert standing.services() == before
    assert standing.ask(SCHEDULES) == [("0 2 * * *",)]
    assert len(standing.ran()) == 4
    assert ("pipeline", "FINISHED") in query(standing.root / "mlflow.db", "select name, status from runs")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["nope"],
            "cron expression 'nope' is wrong or never comes true; write minute, hour, day, month and weekday: "
            "'0 2 * * *' is 2 o'clock every night",
        ),
        (["61 * * * *"], "cron expression '61 * * * *' is wrong"),
        (["0 0 31 2 *"], "never comes true"),
        (["0 2 * * *", "--timezone", "Nowhere"], "no time zone 'Nowhere'"),
    ],
)
def test_a_wrong_time_is_one_message(fresh: Project, words: list[str], message: str) -> None:
    output = fresh.rlhf("schedule", *words, expect=1)
    assert message in output
    assert output.startswith("error:")


def test_times_are_those_of_the_time_zone() -> None:
    times = next_fire_times("30 2 * * *", "Asia/Kolkata", count=2)
    assert [(time.hour, time.minute, str(time.utcoffset())) for time in times] == [(2, 30, "5:30:00")] * 2
    assert (times[1] - times[0]).total_seconds() == 24 * 3600


def test_two_folders_never_share_a_deployment() -> None:
    names = [deployment_name(Path(path)) for path in ("/a/project", "/b/project", "/a/project")]
    assert names[0] == names[2] != names[1]
    assert names[0].startswith("project-")
    assert deployment_name(Path("/a/50% & more")).startswith("50----more-")


@pytest.mark.parametrize(
    ("name", "flow", "entrypoint"),
    [("nightly", pipeline, "flows/pipeline.py:pipeline"), ("retrain", retrain, "flows/retrain.py:retrain")],
)
def test_prefect_yaml_deploys_the_flows(name: str, flow: Any, entrypoint: str) -> None:
    file = YAML(typ="safe").load(ROOT / "prefect.yaml")
    assert str(ROOT) not in (ROOT / "prefect.yaml").read_text()
    (found,) = (deployment for deployment in file["deployments"] if deployment["name"] == name)
    assert found["entrypoint"] == entrypoint
    path, function = entrypoint.split(":")
    loaded = load_flow_from_entrypoint(str(ROOT / path) + ":" + function)
    assert loaded.name == flow.name
    assert set(found["parameters"]) == set(loaded.parameters.properties) == set(flow.parameters.properties)
    assert flow.validate_parameters(found["parameters"]) == found["parameters"]
    assert found["concurrency_limit"]["limit"] == 1
    for schedule in found.get("schedules", []):
        assert next_fire_times(schedule["cron"], schedule["timezone"], count=1)
