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
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.errors import ConfigError, StageError
from tasks.core.outbox import Outbox, deliver_left
from tasks.core.paths import project_root, state

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from tasks.core.versioning import Inputs

__all__ = [
    "SWEEP_VARIABLE",
    "WEIGHTS",
    "PipelineRun",
    "StageRun",
    "flow_environment",
    "git_commit",
    "measure_pipeline",
    "open_store",
    "pipeline_run",
    "pipeline_tags",
    "prepare",
    "server_command",
    "stage_run",
    "store_uri",
    "tag_pipeline",
]

EXPERIMENT = "rlhf"
STAGE_TAG, KEY_TAG, FLOW_TAG = "rlhf.stage", "rlhf.key", "prefect.flow_run_id"

# A run's own name, by which it is found again when MLflow's answer to its creation was lost.
OUTBOX, OUTBOX_TAG = "outbox", "rlhf.outbox"

# How MLflow's page knows that a file is a table (mlflow.client.MlflowClient.log_table writes it).
TABLES_TAG = "mlflow.loggedArtifacts"

# How a flow tells the stages it runs, in this process or in a child, which runs they belong to.
PIPELINE_VARIABLE, FLOW_VARIABLE = "RLHF_PIPELINE_RUN_ID", "RLHF_FLOW_RUN_ID"
EXPERIMENT_VARIABLE = "RLHF_EXPERIMENT_ID"

SWEEP_VARIABLE = "RLHF_SWEEP"
"""How a sweep tells its pipeline runs what they belong to: a JSON object with `sweep` and `variant`."""

WEIGHTS = ("adapter", "model")
"""Names of the folders of weights among a stage's outputs."""

# mlflow.utils.validation: at most this many per request, a tag not much longer, and no such characters in the name of a
# metric or parameter.
BATCH, TAG_LENGTH = 100, 5000
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

    What runs could not say while the server was away is said now.

    Raises:
        ConfigError: the store cannot be opened.
    """
    open_store()
    _deliver_kept()


@contextmanager
def pipeline_run(flow_run_id: str, parameters: Mapping[str, object]) -> Iterator[PipelineRun]:
    """The parent run of everything that one flow executes."""
    swept = {f"rlhf.{key}": value for key, value in json.loads(os.environ.get(SWEEP_VARIABLE, "{}")).items()}
    tags = {**_source("pipeline"), FLOW_TAG: flow_run_id, **swept}
    pipeline = PipelineRun(_new_outbox())
    try:
        with _closing(pipeline):
            pipeline.create(swept.get("rlhf.variant", "pipeline"), tags)
            pipeline.log_params(parameters)
            yield pipeline
    finally:
        _deliver_kept()


@contextmanager
def flow_environment(pipeline: PipelineRun, flow_run_id: str) -> Iterator[None]:
    """While this lasts, stages that run here or in a child become children of the pipeline run."""
    told = {
        PIPELINE_VARIABLE: pipeline.run_id,
        FLOW_VARIABLE: flow_run_id,
        EXPERIMENT_VARIABLE: pipeline.experiment,
    }
    os.environ.update(told)
    try:
        yield
    finally:
        for variable in told:
            del os.environ[variable]


def tag_pipeline(flow_run_id: str, tags: Mapping[str, str]) -> None:
    """Say something about a pipeline run that has ended."""
    client, _ = open_store()
    for run in _pipeline_runs(flow_run_id):
        for key, value in tags.items():
            client.set_tag(run.info.run_id, key, value[:TAG_LENGTH])


def measure_pipeline(flow_run_id: str, metrics: Mapping[str, float]) -> None:
    """Add final numbers to a pipeline run that has ended."""
    from mlflow.entities import Metric

    client, _ = open_store()
    numbers = [Metric(FORBIDDEN.sub("_", key), float(value), _now(), 0) for key, value in metrics.items()]
    for run in _pipeline_runs(flow_run_id):
        client.log_batch(run.info.run_id, metrics=numbers)


def pipeline_tags(flow_run_id: str) -> tuple[str, dict[str, str]]:
    """MLflow's id of the pipeline run of a flow, and its tags: see `PipelineRun.log_stage`.

    Raises:
        StageError: the store does not know it.
    """
    for run in _pipeline_runs(flow_run_id):
        return run.info.run_id, dict(run.data.tags)
    raise StageError(f"MLflow at {store_uri()} does not know the pipeline run of {flow_run_id}: was it away?")


def _pipeline_runs(flow_run_id: str) -> list[Any]:
    client, experiment = open_store()
    runs = client.search_runs([experiment], f"tags.`{FLOW_TAG}` = '{flow_run_id}'")
    return [run for run in runs if STAGE_TAG not in run.data.tags]


def git_commit() -> str:
    """The commit that is checked out; empty where there is none."""
    command = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(command, cwd=project_root(), capture_output=True, text=True, check=False)
    return commit.stdout.strip() if commit.returncode == 0 else ""


@contextmanager
def stage_run(
    name: str, inputs: Inputs, parameters: Mapping[str, object], tags: Mapping[str, str]
) -> Iterator[StageRun]:
    """The run of one executed stage: FINISHED, or FAILED after an error, or KILLED when it was interrupted."""
    tags = {**_source(name), STAGE_TAG: name, KEY_TAG: inputs.key, **tags}
    if parent := os.environ.get(PIPELINE_VARIABLE):
        tags |= {"mlflow.parentRunId": parent, FLOW_TAG: os.environ.get(FLOW_VARIABLE, "")}
    stage = StageRun(_new_outbox())
    with _closing(stage):
        stage.create(name, tags)
        stage.log_params(parameters)
        stage.log_inputs(inputs.data)
        yield stage


class _Run:
    """A run that is open. Whatever is said of it goes through an outbox, since a server may be away for a while.

    Each `_do_…` does one deed, and may do it twice without harm (see `tasks.core.outbox`).
    """

    def __init__(self, outbox: Path) -> None:
        self._client, self.experiment = open_store()
        self._name = outbox.stem
        self._run_id: str | None = None
        self.outbox = Outbox(outbox, self._do, _is_away, _warn)

    @property
    def run_id(self) -> str:
        """MLflow's id of this run.

        Raises:
            StageError: the run could not be created yet, because the server is away.
        """
        if self._run_id is None:
            runs = self._client.search_runs([self.experiment], f"tags.`{OUTBOX_TAG}` = '{self._name}'", max_results=1)
            if not runs:
                raise StageError(f"MLflow at {store_uri()} does not know this run: is the server away?")
            self._run_id = str(runs[0].info.run_id)
        return self._run_id

    def create(self, name: str, tags: Mapping[str, str]) -> None:
        """Begin."""
        short = {key: value[:TAG_LENGTH] for key, value in tags.items()}
        self.outbox.put("create", name=name, tags={**short, OUTBOX_TAG: self._name}, time=_now())

    def log_params(self, parameters: Mapping[str, object]) -> None:
        """Record parameters under their flattened keys."""
        self.outbox.put("params", parameters={FORBIDDEN.sub("_", key): str(value) for key, value in parameters.items()})

    def log_metrics(self, metrics: Mapping[str, float], step: int | None) -> None:
        """Record numbers; without a step they are final values."""
        values = {FORBIDDEN.sub("_", key): float(value) for key, value in metrics.items()}
        self.outbox.put("metrics", metrics=values, step=step or 0, time=_now())

    def tag(self, key: str, value: str) -> None:
        """Say something by which runs can be searched; the end of a long value is cut off."""
        self.outbox.put("tag", key=key, value=value[:TAG_LENGTH])

    def end(self, status: str, error: str | None = None) -> None:
        """Say what became of it; what is left in the outbox is delivered now if the server is back."""
        if error:
            self.tag("error", error)
        self.outbox.put("end", status=status, time=_now())
        if not self.outbox.deliver():
            _kept.append(self.outbox)

    def _do(self, deed: str, content: Mapping[str, Any]) -> None:
        getattr(self, f"_do_{deed}")(**content)

    def _do_create(self, name: str, tags: Mapping[str, str], time: int) -> None:
        try:
            found = self.run_id
        except StageError:
            run = self._client.create_run(self.experiment, start_time=time, run_name=name, tags=dict(tags))
            found = str(run.info.run_id)
        self._run_id = found

    def _do_params(self, parameters: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in parameters.items()]
        for start in range(0, len(params), BATCH):
            self._client.log_batch(self.run_id, params=params[start : start + BATCH])

    def _do_metrics(self, metrics: Mapping[str, float], step: int, time: int) -> None:
        from mlflow.entities import Metric

        self._client.log_batch(self.run_id, metrics=[Metric(key, value, time, step) for key, value in metrics.items()])

    def _do_tag(self, key: str, value: str) -> None:
        self._client.set_tag(self.run_id, key, value)

    def _do_end(self, status: str, time: int) -> None:
        self._client.set_terminated(self.run_id, status, end_time=time)

    def _do_origin(self, name: str, key: str) -> None:
        condition = f"tags.`{KEY_TAG}` = '{key}' and attributes.status = 'FINISHED'"
        if runs := self._client.search_runs([self.experiment], condition, max_results=1):
            self._client.set_tag(self.run_id, f"{name}.run", runs[0].info.run_id)

    def _do_samples(self, name: str, rows: Sequence[Mapping[str, Any]], step: int | None) -> None:
        """MLflow's own `log_table` only appends; here the rows of a step take the place of those that it had."""
        file = f"{name}.json"
        table: dict[str, Any] = {"columns": [], "data": []}
        if any(item.path == file for item in self._client.list_artifacts(self.run_id)):
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(self._client.download_artifacts(self.run_id, file, folder))
                table = json.loads(copy.read_text(encoding="utf-8"))
        old = [dict(zip(table["columns"], line, strict=True)) for line in table["data"]]
        kept = [row for row in old if row.get("step") != step] + list(rows)
        columns = list(dict.fromkeys(key for row in kept for key in row))
        data = [[row.get(column) for column in columns] for row in kept]
        self._client.log_dict(self.run_id, {"columns": columns, "data": data}, file)
        tables = json.loads(self._client.get_run(self.run_id).data.tags.get(TABLES_TAG, "[]"))
        if {"path": file, "type": "table"} not in tables:
            self._client.set_tag(self.run_id, TABLES_TAG, json.dumps([*tables, {"path": file, "type": "table"}]))

    def _do_file(self, path: str, folder: str | None) -> None:
        if Path(path).exists():  # a later run may have replaced it
            self._client.log_artifact(self.run_id, path, folder)

    def _do_inputs(self, data: Mapping[str, str]) -> None:
        from mlflow.entities import Dataset, DatasetInput

        sets = [Dataset(path, md5, "local", json.dumps({"uri": path})) for path, md5 in data.items()]
        self._client.log_inputs(self.run_id, datasets=[DatasetInput(item) for item in sets])

    def _do_model(self, path: str, md5: str) -> None:
        from mlflow.entities import LoggedModelOutput

        stage = Path(path).parent.name
        tags = {"dvc.path": path, "dvc.md5": md5, STAGE_TAG: stage, OUTBOX_TAG: self._name}
        condition = f"tags.`{OUTBOX_TAG}` = '{self._name}' and tags.`dvc.path` = '{path}'"
        known = self._client.search_logged_models([self.experiment], condition)
        model = (
            known[0]
            if known
            else self._client.create_logged_model(self.experiment, stage, source_run_id=self.run_id, tags=tags)
        )
        self._client.finalize_logged_model(model.model_id, "READY")
        self._client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step=0)])


class PipelineRun(_Run):
    """The parent run: one row that compares whole pipelines."""

    def log_stage(self, name: str, key: str, result: str, why: str, metrics: Mapping[str, float]) -> None:
        """Copy a stage's final metrics as `<stage>.<metric>`, and say which run they come from.

        The numbers are those on disk, which DVC has verified to be the stage's; a cached stage has no run of its own
        here, so the tag `<stage>.run` names the newest finished run of the same key, if this store has one.
        """
        self.log_metrics({f"{name}.{metric}": value for metric, value in metrics.items() if math.isfinite(value)}, None)
        self.tag(f"{name}.key", key)
        self.tag(f"{name}.result", result)
        self.tag(f"{name}.why", why)
        self.outbox.put("origin", name=name, key=key)


class StageRun(_Run):
    """The run of one stage; implements `tasks.core.tracking.Recorder`."""

    def log_samples(self, name: str, rows: Sequence[Mapping[str, object]], step: int | None) -> None:
        """Append rows to the table `<name>.json`, the step in the first column; those of the same step are replaced."""
        named = [{**({} if step is None else {"step": step}), **row} for row in rows]
        cells = [{key: _cell(value) for key, value in row.items()} for row in named]
        if cells:
            self.outbox.put("samples", name=name, rows=cells, step=step)

    def log_file(self, path: Path, folder: str | None) -> None:
        """Copy a file into the run's artifacts."""
        self.outbox.put("file", path=str(path), folder=folder)

    def log_inputs(self, data: Mapping[str, str]) -> None:
        """Record what the stage reads: each file or folder with its DVC md5 as digest."""
        if data:
            self.outbox.put("inputs", data=dict(data))

    def log_outputs(self, digests: Mapping[str, str]) -> None:
        """Record each output's md5, and a model reference for a folder of weights: the bytes stay with DVC."""
        for path, md5 in digests.items():
            self.tag(f"output.{Path(path).name}", md5)
            if Path(path).name in WEIGHTS:
                self.outbox.put("model", path=path, md5=md5)


_ENVIRONMENT = {
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Files go through the server: the address under which it knows its store need not exist here.
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def open_store() -> tuple[MlflowClient, str]:
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
    # Files of a run are found by `runs:/…`, which MLflow resolves against its global URI.
    set_tracking_uri(uri)
    if known := os.environ.get(EXPERIMENT_VARIABLE):  # the flow has opened it, and the server may be away by now
        return MlflowClient(uri), known
    state().mkdir(exist_ok=True)
    try:
        # Two processes that open a new store at once would both create its tables. And a local store makes a folder
        # `mlruns` in the working directory, used or not.
        with FileLock(state() / "mlflow.lock"), contextlib.chdir(state()):
            client = MlflowClient(uri)
            experiment = client.get_experiment_by_name(EXPERIMENT)
            if experiment:
                return client, str(experiment.experiment_id)
            folder = (project_root() / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
            return client, client.create_experiment(EXPERIMENT, artifact_location=folder)
    except MlflowException as error:
        raise ConfigError(f"the MLflow store {uri} cannot be opened; check MLFLOW_TRACKING_URI: {error}") from error


@contextmanager
def _closing(run: _Run) -> Iterator[None]:
    """End the run as what became of it; an error while saying so must not hide the one that ended it."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except Exception as error:
        with contextlib.suppress(MlflowException, StageError):
            run.end("FAILED", f"{type(error).__name__}: {error}")
        if isinstance(error, MlflowException):
            reason = next((line for line in str(error).splitlines() if "rror)" in line), str(error))
            raise StageError(
                f"MLflow cannot write to {store_uri()}: {reason}; is the disk full? Then run again"
            ) from error
        raise
    except BaseException:
        run.end("KILLED")
        raise
    run.end("FINISHED")


_kept: list[Outbox] = []


def _deliver_kept() -> None:
    """Say what runs could not say while the server was away: those of this process, and of others that have ended."""
    _kept[:] = [outbox for outbox in _kept if not outbox.deliver()]
    try:
        open_store()
    except ConfigError:  # still away
        return
    deliver_left(state() / OUTBOX, lambda path: _Run(path).outbox, _warn)


def _new_outbox() -> Path:
    return state() / OUTBOX / f"{uuid.uuid4().hex}.jsonl"


def _is_away(error: Exception) -> bool:
    """A server that does not answer, or says that it cannot now; an error in a local store is one."""
    from mlflow.exceptions import MlflowException

    if not store_uri().startswith("http"):
        return False
    if isinstance(error, MlflowException):
        status = int(error.get_http_status_code())  # type: ignore[no-untyped-call]
        return status >= 500 or error.error_code == "REQUEST_LIMIT_EXCEEDED"
    return isinstance(error, OSError)


def _warn(text: str) -> None:
    print(f"warning: MLflow at {store_uri()}: {text}", file=sys.stderr)


def _now() -> int:
    return int(time.time() * 1000)


def _source(name: str) -> dict[str, str]:
    tags = {"mlflow.source.name": name, "mlflow.source.type": "LOCAL", "mlflow.user": os.environ.get("USER", "unknown")}
    commit = git_commit()
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, str | bool | int | float) else json.dumps(value, default=str)
