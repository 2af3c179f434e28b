"""Runs of MLflow in a store of their own."""

from pathlib import Path

import pytest

from tasks.runtime import mlflow_runs, mlflow_store
from tasks.runtime.dvc_stages import Inputs
from tasks.runtime.mlflow_runs import OpenRun
from tasks.runtime.mlflow_store import open_store


@pytest.fixture
def project(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    return root


def test_writes_whose_answers_were_lost_are_there_once(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write is done, its answer lost, and done again by the next process."""
    call = OpenRun._call

    def lose_answer(run: OpenRun, line: str) -> None:
        call(run, line)
        raise ConnectionError("the answer was lost")

    monkeypatch.setattr(mlflow_store, "_is_unavailable", lambda error: isinstance(error, ConnectionError))
    monkeypatch.setattr(OpenRun, "_call", lose_answer)
    monkeypatch.setattr(mlflow_store, "RETRY_SECONDS", -1.0)
    (project / "a.txt").write_text("text")
    with mlflow_runs.stage_run("sft", Inputs("key", {"artifacts/prepare/rows": "md5"}), {"rate": 0.1}, {}) as run:
        run.log_metrics({"loss": 0.5, "nan": float("nan")}, 1)
        run.log_samples("samples", [{"text": "old"}], 1)
        run.log_samples("samples", [{"text": "new"}, {"more": [1, 2]}], 1)
        run.log_file(project / "a.txt", "files")
        run.log_outputs({"artifacts/sft/adapter": "md5"})
    queue = project / ".rlhf" / "mlflow_queue"
    assert len(list(queue.glob("*.jsonl"))) == 1
    monkeypatch.setattr(OpenRun, "_call", call)
    mlflow_runs.connect()
    assert list(queue.iterdir()) == []

    from mlflow.artifacts import load_dict

    client, experiment = open_store()
    (found,) = client.search_runs([experiment])
    run_id = found.info.run_id
    assert found.info.status == "FINISHED"
    assert found.data.params == {"rate": "0.1"}
    assert [(point.step, point.value) for point in client.get_metric_history(run_id, "loss")] == [(1, 0.5)]
    assert len(client.get_metric_history(run_id, "nan")) == 1
    assert load_dict(f"runs:/{run_id}/samples.json") == {
        "columns": ["step", "text", "more"], "data": [[1, "new", None], [1, None, "[1, 2]"]]
    }  # fmt: skip
    assert [item.path for item in client.list_artifacts(run_id, "files")] == ["files/a.txt"]
    assert [item.dataset.digest for item in found.inputs.dataset_inputs] == ["md5"]
    (model,) = client.search_logged_models([experiment])
    assert model.tags["dvc.path"] == "artifacts/sft/adapter"


def test_a_failed_and_an_interrupted_stage_are_recorded_as_such(project: Path) -> None:
    for error in (ValueError("too small"), KeyboardInterrupt()):
        with pytest.raises(type(error)), mlflow_runs.stage_run("sft", Inputs("key"), {}, {}):
            raise error
    client, experiment = open_store()
    interrupted, failed = client.search_runs([experiment])
    assert (failed.info.status, failed.data.tags["error"]) == ("FAILED", "ValueError: too small")
    assert interrupted.info.status == "KILLED"
