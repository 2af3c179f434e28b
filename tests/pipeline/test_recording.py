"""What a run leaves in MLflow: a parent for the flow, a child for each executed stage, with all that belongs to it."""

from __future__ import annotations

import json
import re
import sqlite3
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.pipeline.conftest import Project

# Reads the store in the project's own process: MLflow keeps its store's address for a whole process.
READ = """
import json
from mlflow import MlflowClient
client = MlflowClient("sqlite:///mlflow.db")
experiment = client.get_experiment_by_name("rlhf")
runs = [
    {"id": run.info.run_id, "name": run.info.run_name, "status": run.info.status, "params": run.data.params,
     "metrics": run.data.metrics, "tags": run.data.tags, "artifact_uri": run.info.artifact_uri,
     "inputs": {item.dataset.name: item.dataset.digest for item in run.inputs.dataset_inputs},
     "models": [client.get_logged_model(item.model_id).tags for item in getattr(run.outputs, "model_outputs", [])],
     "loss": [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss")]}
    for run in client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
]
print(json.dumps(runs))
"""


def runs(project: Project) -> list[dict[str, Any]]:
    output = project.command(sys.executable, "-W", "ignore", "-c", READ)
    found: list[dict[str, Any]] = json.loads(output.splitlines()[-1])
    return found


def digest(project: Project, path: str) -> str:
    lines = project.lock().splitlines()
    return lines[lines.index(f"    - path: {path}") + 2].split()[1]


def test_one_child_per_executed_stage_under_one_parent(finished: tuple[Project, str]) -> None:
    project = finished[0]
    parent, *children = runs(project)
    assert parent["name"] == "pipeline"
    assert [child["name"] for child in children] == ["collect", "prepare", "sft", "gold_judge"]
    assert {run["status"] for run in [parent, *children]} == {"FINISHED"}
    assert {child["tags"]["mlflow.parentRunId"] for child in children} == {parent["id"]}
    flow = parent["tags"]["prefect.flow_run_id"]
    assert {child["tags"]["prefect.flow_run_id"] for child in children} == {flow}
    sft = children[2]
    assert sft["tags"]["rlhf.stage"] == "sft"
    assert sft["params"]["epochs"] == "1"
    assert sft["params"]["lora.r"] == "16"
    assert sft["params"]["seed"] == "0"
    assert sft["metrics"]["final/seed"] == 0
    assert sft["metrics"]["final/inner.one"] == 1
    assert sft["loss"] == [[1, 0.5]]
    assert sft["inputs"] == {"artifacts/prepare/result": digest(project, "artifacts/prepare/result")}
    assert sft["tags"]["output.result"] == digest(project, "artifacts/sft/result")
    assert parent["metrics"]["sft.inner.one"] == 1
    assert parent["tags"]["sft.run"] == sft["id"]
    assert parent["tags"]["sft.key"] == sft["tags"]["rlhf.key"]
    assert not (project.root / "mlruns").exists()


def test_samples_of_later_steps_are_appended(finished: tuple[Project, str]) -> None:
    sft = runs(finished[0])[3]
    table = json.loads((finished[0].root / "mlartifacts" / sft["id"] / "artifacts" / "samples.json").read_text())
    assert table == {"columns": ["step", "prompt", "reward"], "data": [[1, "p", 1.0], [2, "p", 2.0]]}


def test_a_cached_stage_lends_the_parent_its_numbers_and_its_run(project: Project) -> None:
    first = runs(project)
    project.rlhf("run")
    new = runs(project)[len(first) :]
    assert [run["name"] for run in new] == ["pipeline"]
    assert new[0]["metrics"]["sft.inner.one"] == 1
    assert new[0]["tags"]["sft.run"] == first[3]["id"]
    assert new[0]["tags"]["sft.result"] == "unchanged"
    assert new[0]["tags"]["sft.reason"] == "nothing that it reads has changed"


def test_a_stage_run_by_dvc_is_recorded_too_and_a_failed_one_is_failed(project: Project) -> None:
    before = len(runs(project))
    project.edit("params.yaml", "max_validation_examples: 100", "max_validation_examples: 99")
    project.edit("tasks/sft.py", '"result").mkdir()', '"result").mkdir(); (out / "adapter").mkdir()')
    project.edit("dvc.yaml", "outs: [artifacts/sft/result]", "outs: [artifacts/sft/result, artifacts/sft/adapter]")
    project.dvc("repro", "sft")
    (project.root / ".rlhf" / "gold_judge.fails").touch()
    project.rlhf("run", "--force", "gold_judge", expect=1)
    sft, parent, failed = runs(project)[before:]
    assert (sft["name"], sft["status"]) == ("sft", "FINISHED")
    code, parameter = sft["tags"]["rlhf.reasons"].split("; ")
    assert re.fullmatch("tasks/sft.py changed: [0-9a-f]{8} → [0-9a-f]{8}", code)
    assert parameter == "sft.max_validation_examples: 100 → 99"
    assert "mlflow.parentRunId" not in sft["tags"]
    assert sft["params"]["max_validation_examples"] == "99"
    assert sft["models"][0]["dvc.path"] == "artifacts/sft/adapter"
    assert sft["models"][0]["dvc.md5"] == digest(project, "artifacts/sft/adapter")
    assert (parent["name"], parent["status"]) == ("pipeline", "FAILED")
    assert (failed["name"], failed["status"]) == ("gold_judge", "FAILED")
    assert "told to fail" in failed["tags"]["error"]


def test_prefect_shows_each_stage_by_name_with_its_key_and_why(project: Project) -> None:
    """Prefect's own database, because its API keeps a cached task's key in the state's details."""
    key = runs(project)[3]["tags"]["rlhf.key"]
    project.rlhf("run")
    database = sqlite3.connect(f"file:{project.environment['PREFECT_HOME']}/prefect.db?mode=ro", uri=True)
    project.wait_until(lambda: bool(database.execute(CACHED, [key]).fetchall()))
    name, state, message = database.execute(CACHED, [key]).fetchall()[0]
    assert (name, state) == ("sft", "Cached")
    assert message == "Unchanged: nothing that it reads has changed"
    database.close()


CACHED = """
select task_run.name, task_run_state.name, task_run_state.message from task_run
join task_run_state on task_run_state.task_run_id = task_run.id
where json_extract(task_run_state.state_details, '$.cache_key') = ? and task_run_state.name = 'Cached'
"""
