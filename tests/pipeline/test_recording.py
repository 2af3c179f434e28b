"""What a run leaves in MLflow: a parent for the flow, a child for each executed stage, with all that belongs to it."""

import re
from pathlib import Path

from tests.pipeline.conftest import STAGES, Project, query, wait_for


def digest(project: Project, path: str) -> str:
    lines = project.lock().splitlines()
    return lines[lines.index(f"    - path: {path}") + 2].split()[1]


def test_one_child_per_executed_stage_under_one_parent(finished: Project) -> None:
    parent, *children = finished.runs()
    assert parent["name"] == "pipeline"
    assert [child["name"] for child in children] == list(STAGES)
    assert {run["status"] for run in [parent, *children]} == {"FINISHED"}
    assert {child["tags"]["mlflow.parentRunId"] for child in children} == {parent["id"]}
    flow = parent["tags"]["prefect.flow_run_id"]
    assert {child["tags"]["prefect.flow_run_id"] for child in children} == {flow}
    sft = children[2]
    assert sft["tags"]["rlhf.stage"] == "sft"
    assert {"epochs": "1", "lora.r": "16", "seed": "0"}.items() <= sft["params"].items()
    assert {"final/seed": 0, "final/inner.one": 1}.items() <= sft["metrics"].items()
    assert sft["loss"] == [[1, 0.5]]
    assert sft["samples"] == {"columns": ["step", "prompt", "reward"], "data": [[1, "p", 1.0], [2, "p", 2.0]]}
    assert (finished.root / "mlartifacts" / sft["id"] / "artifacts" / "samples.json").is_file()
    assert sft["inputs"] == {"artifacts/prepare/result": digest(finished, "artifacts/prepare/result")}
    assert sft["tags"]["output.result"] == digest(finished, "artifacts/sft/result")
    assert parent["metrics"]["sft.inner.one"] == 1
    assert parent["tags"]["sft.run"] == sft["id"]
    assert parent["tags"]["sft.key"] == sft["tags"]["rlhf.key"]
    assert not (finished.root / "mlruns").exists()


def test_a_cached_stage_lends_the_parent_its_numbers_and_its_run(project: Project) -> None:
    first = project.runs()
    project.rlhf("run")
    new = project.runs()[len(first) :]
    assert [run["name"] for run in new] == ["pipeline, cached"]
    assert new[0]["metrics"]["sft.inner.one"] == 1
    assert new[0]["tags"]["sft.run"] == first[3]["id"]
    assert new[0]["tags"]["sft.result"] == "unchanged"
    assert new[0]["tags"]["sft.reason"] == "nothing that it reads has changed"


def test_a_stage_run_by_dvc_is_recorded_too_and_a_failed_one_is_failed(project: Project) -> None:
    before = len(project.runs())
    project.edit("params.yaml", "max_validation_examples: 100", "max_validation_examples: 99")
    project.edit("tasks/sft.py", '"result").mkdir()', '"result").mkdir(); (out / "adapter").mkdir()')
    project.edit("dvc.yaml", "outs: [artifacts/sft/result]", "outs: [artifacts/sft/result, artifacts/sft/adapter]")
    project.dvc("repro", "sft")
    (project.root / ".rlhf" / "gold_judge.fails").touch()
    project.rlhf("run", "--force", "gold_judge", expect=1)
    sft, parent, failed = project.runs()[before:]
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
    key = project.runs()[3]["tags"]["rlhf.key"]
    project.rlhf("run")
    database = Path(project.environment["PREFECT_HOME"], "prefect.db")
    wait_for(lambda: bool(query(database, CACHED, key)))
    assert query(database, CACHED, key)[0] == ("sft", "Cached", "Unchanged: nothing that it reads has changed")


CACHED = """
select task_run.name, task_run_state.name, task_run_state.message from task_run
join task_run_state on task_run_state.task_run_id = task_run.id
where json_extract(task_run_state.state_details, '$.cache_key') = ? and task_run_state.name = 'Cached'
"""
