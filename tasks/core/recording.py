"""The only door to MLflow: one run per executed stage, one parent run per flow.

MLflow takes seconds to import, so it is imported when a run begins and not before. Everything goes through
`MlflowClient` with explicit run ids: MLflow's active run belongs to a thread, and a trainer's threads are not ours.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.errors import ConfigError, StageError
from tasks.core.paths import project_root, state

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from tasks.core.versioning import Inputs

__all__ = [
    "PipelineRun",
    "StageRun",
    "flow_environment",
    "pipeline_run",
    "prepare",
    "server_command",
    "stage_run",
    "store_uri",
]

EXPERIMENT = "rlhf"
STAGE_TAG, KEY_TAG, FLOW_TAG = "rlhf.stage", "rlhf.key", "prefect.flow_run_id"

# How a flow tells the stages it runs, in this process or in a child, which runs they belong to.
PIPELINE_VARIABLE, FLOW_VARIABLE = "RLHF_PIPELINE_RUN_ID", "RLHF_FLOW_RUN_ID"

# mlflow.utils.validation: at most this many per request, and these characters in the name of a metric or parameter.
BATCH = 100
FORBIDDEN = re.compile(r"[^\w\-. /:]")


def store_uri() -> str:
    """Where runs are kept: `$MLFLOW_TRACKING_URI`, else mlflow.db in the project."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{project_root() / 'mlflow.db'}"


def server_command(port: int) -> tuple[list[str], dict[str, str]]:
    """Command and environment of MLflow's server on loopback; one worker and no job runner make it start fast."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store_uri()]
    command += ["--artifacts-destination", str(project_root() / "mlartifacts")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return command, {**os.environ, **_ENVIRONMENT, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def prepare() -> None:
    """Import MLflow and open its store, which takes seconds: to be called while there is something else to wait for.

    Raises:
        ConfigError: the store cannot be opened.
    """
    _client()


@contextmanager
def pipeline_run(flow_run_id: str, parameters: Mapping[str, object]) -> Iterator[PipelineRun]:
    """The parent run of everything that one flow executes."""
    client, experiment = _client()
    run = client.create_run(experiment, run_name="pipeline", tags={**_source("pipeline"), FLOW_TAG: flow_run_id})
    with _closing(client, run.info.run_id):
        pipeline = PipelineRun(client, experiment, run.info.run_id)
        pipeline.log_params(parameters)
        yield pipeline


@contextmanager
def flow_environment(pipeline: PipelineRun, flow_run_id: str) -> Iterator[None]:
    """While this lasts, stages that run here or in a child become children of the pipeline run."""
    os.environ.update({PIPELINE_VARIABLE: pipeline.run_id, FLOW_VARIABLE: flow_run_id})
    try:
        yield
    finally:
        del os.environ[PIPELINE_VARIABLE], os.environ[FLOW_VARIABLE]


@contextmanager
def stage_run(name: str, inputs: Inputs, parameters: Mapping[str, object]) -> Iterator[StageRun]:
    """The run of one executed stage: FINISHED, or FAILED after an error, or KILLED when it was interrupted."""
    client, experiment = _client()
    tags = {**_source(name), STAGE_TAG: name, KEY_TAG: inputs.key}
    if parent := os.environ.get(PIPELINE_VARIABLE):
        tags |= {"mlflow.parentRunId": parent, FLOW_TAG: os.environ.get(FLOW_VARIABLE, "")}
    run = client.create_run(experiment, run_name=name, tags=tags)
    with _closing(client, run.info.run_id):
        stage = StageRun(client, experiment, run.info.run_id, name)
        stage.log_params(parameters)
        stage.log_inputs(inputs.data)
        yield stage


class _Run:
    """A run that is open."""

    def __init__(self, client: MlflowClient, experiment: str, run_id: str) -> None:
        self._client, self._experiment, self.run_id = client, experiment, run_id

    def log_params(self, parameters: Mapping[str, object]) -> None:
        """Record parameters under their flattened keys."""
        from mlflow.entities import Param

        params = [Param(FORBIDDEN.sub("_", key), str(value)) for key, value in parameters.items()]
        for start in range(0, len(params), BATCH):
            self._client.log_batch(self.run_id, params=params[start : start + BATCH])

    def log_metrics(self, metrics: Mapping[str, float], step: int | None) -> None:
        """Record numbers; without a step they are final values."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(FORBIDDEN.sub("_", key), float(value), now, step or 0) for key, value in metrics.items()]
        self._client.log_batch(self.run_id, metrics=values)


class PipelineRun(_Run):
    """The parent run: one row that compares whole pipelines."""

    def log_stage(self, name: str, key: str, result: str, metrics: Mapping[str, float]) -> None:
        """Copy a stage's final metrics as `<stage>.<metric>`, and say which run they come from.

        The numbers are those on disk, which DVC has verified to be the stage's; a cached stage has no run of its own
        here, so the tag `<stage>.run` names the newest finished run of the same key, if this store has one.
        """
        self.log_metrics({f"{name}.{metric}": value for metric, value in metrics.items() if math.isfinite(value)}, None)
        self._client.set_tag(self.run_id, f"{name}.key", key)
        self._client.set_tag(self.run_id, f"{name}.result", result)
        if source := self._find(key):
            self._client.set_tag(self.run_id, f"{name}.run", source)

    def _find(self, key: str) -> str | None:
        condition = f"tags.`{KEY_TAG}` = '{key}' and attributes.status = 'FINISHED'"
        runs = self._client.search_runs([self._experiment], condition, max_results=1)
        return runs[0].info.run_id if runs else None


class StageRun(_Run):
    """The run of one stage; implements `tasks.core.tracking.Recorder`."""

    def __init__(self, client: MlflowClient, experiment: str, run_id: str, stage: str) -> None:
        super().__init__(client, experiment, run_id)
        self._stage = stage

    def log_samples(self, name: str, rows: Sequence[Mapping[str, object]], step: int | None) -> None:
        """Append rows to the table `<name>.json`, the step in the first column."""
        rows = [{**({} if step is None else {"step": step}), **row} for row in rows]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        table = {column: [_cell(row.get(column)) for row in rows] for column in columns}
        if rows:
            self._client.log_table(self.run_id, table, f"{name}.json")

    def log_file(self, path: Path, folder: str | None) -> None:
        """Copy a file into the run's artifacts."""
        self._client.log_artifact(self.run_id, str(path), folder)

    def log_inputs(self, data: Mapping[str, str]) -> None:
        """Record what the stage reads: each file or folder with its DVC md5 as digest."""
        from mlflow.entities import Dataset, DatasetInput

        sets = [Dataset(path, md5, "local", json.dumps({"uri": path})) for path, md5 in data.items()]
        if sets:
            self._client.log_inputs(self.run_id, datasets=[DatasetInput(item) for item in sets])

    def log_outputs(self, digests: Mapping[str, str]) -> None:
        """Record each output's md5, and a model reference for a folder of weights: the bytes stay with DVC."""
        for path, md5 in digests.items():
            self._client.set_tag(self.run_id, f"output.{Path(path).name}", md5)
            if Path(path).name in ("adapter", "model"):
                self._log_model(path, md5)

    def _log_model(self, path: str, md5: str) -> None:
        from mlflow.entities import LoggedModelOutput

        tags = {"dvc.path": path, "dvc.md5": md5, STAGE_TAG: self._stage}
        model = self._client.create_logged_model(self._experiment, self._stage, source_run_id=self.run_id, tags=tags)
        self._client.finalize_logged_model(model.model_id, "READY")
        self._client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step=0)])


_ENVIRONMENT = {
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def _client() -> tuple[MlflowClient, str]:
    """A client for the store, and the experiment, made on first use.

    Raises:
        ConfigError: the store cannot be opened.
    """
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it prints what it then raises
    from filelock import FileLock
    from mlflow import MlflowClient, set_tracking_uri
    from mlflow.exceptions import MlflowException

    uri = store_uri()
    # log_table reads the table back by `runs:/…`, which MLflow resolves against its global URI.
    set_tracking_uri(uri)
    state().mkdir(exist_ok=True)
    try:
        # Two processes that open a new store at once would both create its tables. And a local store makes a folder
        # `mlruns` in the working directory, used or not.
        with FileLock(state() / "mlflow.lock"), contextlib.chdir(state()):
            client = MlflowClient(uri)
            known = client.get_experiment_by_name(EXPERIMENT)
            if known:
                return client, str(known.experiment_id)
            folder = (project_root() / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
            return client, client.create_experiment(EXPERIMENT, artifact_location=folder)
    except MlflowException as error:
        raise ConfigError(f"the MLflow store {uri} cannot be opened; check MLFLOW_TRACKING_URI: {error}") from error


@contextmanager
def _closing(client: MlflowClient, run_id: str) -> Iterator[None]:
    """End the run as what became of it; an error while saying so must not hide the one that ended it."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except Exception as error:
        with contextlib.suppress(MlflowException):
            client.set_tag(run_id, "error", f"{type(error).__name__}: {error}"[:5000])
            client.set_terminated(run_id, "FAILED")
        if isinstance(error, MlflowException):
            reason = next((line for line in str(error).splitlines() if "rror)" in line), str(error))
            raise StageError(
                f"MLflow cannot write to {store_uri()}: {reason}; is the disk full, or the server gone? Then run again"
            ) from error
        raise
    except BaseException:
        client.set_terminated(run_id, "KILLED")
        raise
    client.set_terminated(run_id, "FINISHED")


def _source(name: str) -> dict[str, str]:
    tags = {"mlflow.source.name": name, "mlflow.source.type": "LOCAL", "mlflow.user": os.environ.get("USER", "unknown")}
    command = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(command, cwd=project_root(), capture_output=True, text=True, check=False)
    return tags | ({"mlflow.source.git.commit": commit.stdout.strip()} if commit.returncode == 0 else {})


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, str | bool | int | float) else json.dumps(value, default=str)
