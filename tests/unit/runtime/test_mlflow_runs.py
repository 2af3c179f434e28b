"""Runs of MLflow in a store of their own."""

import logging
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from flows.services import free_port
from tasks.core.errors import ConfigError
from tasks.runtime import holding, mlflow_pipeline, mlflow_runs, mlflow_store
from tasks.runtime.dvc_stages import Inputs
from tasks.runtime.mlflow_runs import OpenRun
from tasks.runtime.mlflow_store import open_store
from tasks.runtime.stage_runner import Outcome


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

    monkeypatch.setattr(mlflow_store, "is_unavailable", lambda error: isinstance(error, ConnectionError))
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


def test_an_interrupt_while_the_end_is_recorded_is_recorded_as_such(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_status = OpenRun._set_status

    def interrupt(run: OpenRun, status: str) -> None:
        if status == "FINISHED":
            raise KeyboardInterrupt
        set_status(run, status)

    monkeypatch.setattr(OpenRun, "_set_status", interrupt)
    with pytest.raises(KeyboardInterrupt), mlflow_runs.stage_run("sft", Inputs("key"), {}, {}):
        pass
    assert statuses() == ["KILLED"]
    assert list(holding.marks_dir().iterdir()) == []


KILLED = """
import os, signal
from tasks.runtime import mlflow_runs
from tasks.runtime.dvc_stages import Inputs
with mlflow_runs.stage_run("sft", Inputs("key", {}), {}, {}) as run:
    run.log_metrics({"loss": 0.5}, 1)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def statuses() -> list[str]:
    client, experiment = open_store()
    return [run.info.status for run in client.search_runs([experiment])]


def test_a_run_whose_process_was_killed_is_closed_by_the_next_command_and_no_other_is(project: Path) -> None:
    mlflow_runs.connect()
    subprocess.run([sys.executable, "-c", KILLED], check=False)
    assert statuses() == ["RUNNING"]
    with mlflow_runs.stage_run("dpo", Inputs("key", {}), {}, {}):
        mlflow_runs.close_abandoned_runs()
        assert sorted(statuses()) == ["KILLED", "RUNNING"]
    assert sorted(statuses()) == ["FINISHED", "KILLED"]
    assert list(holding.marks_dir().iterdir()) == []


def lock_database(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN EXCLUSIVE")
    return connection


def test_a_locked_database_is_waited_for(project: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    mlflow_runs.connect()
    connection = lock_database(project / "mlflow.db")
    waits = threading.Event()

    def warn(text: str) -> None:
        waits.set()
        print(text)

    monkeypatch.setattr(mlflow_store, "warn", warn)
    threading.Thread(target=lambda: waits.wait() and connection.rollback()).start()
    mlflow_runs.connect()
    assert capsys.readouterr().out.count("another program has locked it") == 1


def test_what_a_locked_database_does_not_take_is_kept(project: Path) -> None:
    with mlflow_runs.stage_run("sft", Inputs("key", {}), {}, {}) as run:
        connection = lock_database(project / "mlflow.db")
        run.log_metrics({"loss": 0.5}, 1)
        connection.rollback()
    client, experiment = open_store()
    (found,) = client.search_runs([experiment])
    assert (found.info.status, found.data.metrics["loss"]) == ("FINISHED", 0.5)


@pytest.mark.parametrize(
    "make", [lambda path: path.write_text("no database " * 99), Path.mkdir], ids=["text", "folder"]
)
def test_a_store_that_is_no_database_is_one_message(project: Path, make) -> None:
    make(project / "mlflow.db")
    with pytest.raises(ConfigError, match=r"mlflow.db cannot be opened; .* move a file that is no database"):
        mlflow_runs.connect()


def test_a_server_that_is_away_is_one_warning(project: Path, monkeypatch: pytest.MonkeyPatch, capfd, caplog) -> None:
    """urllib3 would log each of its tries."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv(mlflow_store.EXPERIMENT_ID_VAR, "1")
    with mlflow_runs.stage_run("sft", Inputs("key", {}), {"rate": 0.1}, {}) as run:
        for step in range(3):
            run.log_metrics({"loss": 0.5}, step)
    assert capfd.readouterr().err.count("\n") == 1
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


HISTORY = [{"step": 1.0, "kl": 0.5, "reward": 1.0, "grad_norm": 9.0}, {"step": 2.0, "kl": 0.7}]


@pytest.mark.parametrize(
    ("result", "reason", "name", "why"),
    [
        ("executed", "ppo.kl_coef: 0.05 → 0.2; tasks/ppo.py changed: 1 → 2", "kl_coef=0.2", "kl_coef=0.2"),
        ("executed", "tasks/ppo.py changed: 1 → 2", "pipeline", "code or data changed"),
        ("executed", "a: 1 → 2; b.c: 3 → [4, 5]; d: 6 → 7; e: 8 → 9", "a=2 c=[4, 5] d=7 +1", "a=2, c=[4, 5], d=7, e=9"),
        ("restored", "seed: 1 → 0", "seed=0, cached", "seed=0"),
        ("unchanged", "nothing that it reads has changed", "pipeline, cached", "nothing changed"),
    ],
)
def test_a_pipelines_run_is_named_by_what_changed_and_has_the_curves(
    result: Any, reason: str, name: str, why: str, project: Path
) -> None:
    metrics = {"kl": 0.7, "accuracy": 0.25}
    with mlflow_pipeline.pipeline_run("flow", {}) as run:
        run.log_stage(Outcome("ppo", result, "key", (reason,), 1.0, metrics, HISTORY))
    client, experiment = open_store()
    (found,) = client.search_runs([experiment])
    assert (found.info.run_name, found.data.tags["rlhf.why"]) == (name, why)
    assert found.data.metrics == {"ppo/kl": 0.7, "ppo/reward": 1.0, "ppo.accuracy": 0.25}
    points = client.get_metric_history(found.info.run_id, "ppo/kl")
    assert sorted((point.step, point.value) for point in points) == [(1, 0.5), (2, 0.7)]
