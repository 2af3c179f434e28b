"""Runs of MLflow: what all have in common, and one per executed stage.

Run ids are explicit: MLflow's active run belongs to a thread, and a trainer's threads are not ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.errors import ConfigError, StageError
from tasks.core.paths import project_root, state_dir
from tasks.runtime import holding
from tasks.runtime.mlflow_store import QueuedRun, flush_stale, is_unavailable, open_store, queued, store_uri

if TYPE_CHECKING:
    from mlflow.entities import Metric, RunTag

    from tasks.runtime.dvc_stages import Inputs

__all__ = [
    "FLOW_TAG", "FLOW_VAR", "KEY_TAG", "MACHINE_TAG", "PIPELINE_VAR", "STAGE_TAG", "WEIGHT_DIRS", "OpenRun", "StageRun",
    "close_abandoned_runs", "connect", "git_commit", "metric_entities", "new_queue", "output_md5s", "recorded",
    "recorded_md5s", "stage_run", "tag_entities", "without_curves",
]  # fmt: skip

STAGE_TAG, KEY_TAG, FLOW_TAG = "rlhf.stage", "rlhf.key", "prefect.flow_run_id"
MACHINE_TAG = "rlhf.machine"  # JSON: what `describe_machine` gave where the stage was computed
OUTPUT_TAG = "output."  # and the output's name: its md5

# A run's own name, by which it is found again when MLflow's answer to its creation was lost.
QUEUE_ID_TAG = "rlhf.queue_id"

MARK = "mlflow"  # the kind of mark by which a process holds its runs

# How a flow names the runs that its stages belong to, in this process or in a child.
PIPELINE_VAR, FLOW_VAR = "RLHF_PIPELINE_RUN_ID", "RLHF_FLOW_RUN_ID"

WEIGHT_DIRS = ("adapter", "model")
"""Names of the folders of weights among a stage's outputs."""

# Limits of mlflow.utils.validation: a tag's length, characters of a metric's or parameter's name, parameters a request.
TAG_LENGTH = 5000
FORBIDDEN = re.compile(r"[^\w\-. /:]")
MAX_PARAMS = 100

TABLES_TAG = "mlflow.loggedArtifacts"  # how MLflow's page knows that a file is a table: MlflowClient.log_table sets it


def connect() -> None:
    """Open the store, write what earlier runs could not, close killed ones; a ConfigError if it cannot be opened."""
    client, experiment = open_store()
    from tasks.runtime import mlflow_pipeline  # noqa: F401  # its writes may be among those that wait

    flush_stale(_queues_dir(), OpenRun)
    try:
        for queue_id in holding.abandoned(MARK):
            for run in client.search_runs([experiment], f"tags.`{QUEUE_ID_TAG}` = '{queue_id}'"):
                if run.info.status == "RUNNING":
                    client.set_terminated(run.info.run_id, "KILLED")
            holding.forget(MARK, queue_id)
    except Exception as error:
        if not is_unavailable(error):
            raise


def close_abandoned_runs() -> None:
    """Close the runs whose process was killed, if there are any; without MLflow's slow import otherwise."""
    if holding.abandoned(MARK):
        with contextlib.suppress(ConfigError):  # a later command tries again
            connect()


@contextmanager
def stage_run(
    name: str, inputs: Inputs, parameters: Mapping[str, object], tags: Mapping[str, str]
) -> Iterator[StageRun]:
    """The run of one executed stage; it ends as `recorded` says."""
    tags = {STAGE_TAG: name, KEY_TAG: inputs.key, **tags}
    if parent := os.environ.get(PIPELINE_VAR):
        tags |= {"mlflow.parentRunId": parent, FLOW_TAG: os.environ.get(FLOW_VAR, "")}
    stage = StageRun(new_queue())
    with recorded(stage, name, name, tags, parameters):
        stage.log_inputs(inputs.data)
        yield stage


@contextmanager
def recorded(
    run: OpenRun, name: str, source: str, tags: Mapping[str, str], parameters: Mapping[str, object]
) -> Iterator[None]:
    """Create a run, and end it: FINISHED, or FAILED after an error, or KILLED when it was interrupted.

    An error while writing that must not hide the one that ended the run.
    """
    from mlflow.exceptions import MlflowException

    with holding.hold(MARK, run.queue_id):
        try:
            run.create(name, {**_source_tags(source), **tags})
            run.log_params(parameters)
            yield
            run.end("FINISHED")
        except Exception as error:
            with contextlib.suppress(MlflowException, StageError):
                run.end("FAILED", f"{type(error).__name__}: {error}")
            if isinstance(error, MlflowException):
                reason = next((line for line in str(error).splitlines() if "rror)" in line), str(error))
                message = f"MLflow cannot write to {store_uri()}: {reason}; is the disk full? Then run again"
                raise StageError(message) from error
            raise
        except BaseException:
            with contextlib.suppress(MlflowException, StageError):
                run.end("KILLED")
            raise


class OpenRun(QueuedRun):
    """A run that is being written."""

    def __init__(self, queue: Path) -> None:
        super().__init__(queue)
        self.client, self.experiment = open_store()
        self.queue_id, self._id = queue.stem, ""

    @property
    def run_id(self) -> str:
        """MLflow's id of this run; a StageError if it could not be created yet, because the server is away."""
        if not self._find():
            raise StageError(f"MLflow at {store_uri()} does not know this run: is the server away?")
        return self._id

    @queued
    def create(self, name: str, tags: Mapping[str, str]) -> None:
        """Create the run in the store."""
        if not self._find():
            tags = {**_cut(tags), QUEUE_ID_TAG: self.queue_id}
            run = self.client.create_run(self.experiment, start_time=self.time, run_name=name, tags=tags)
            self._id = str(run.info.run_id)

    @queued
    def log_params(self, parameters: Mapping[str, object]) -> None:
        """Record parameters under their flattened keys."""
        from mlflow.entities import Param

        params = [Param(FORBIDDEN.sub("_", key), str(value)) for key, value in parameters.items()]
        for start in range(0, len(params), MAX_PARAMS):
            self.client.log_batch(self.run_id, params=params[start : start + MAX_PARAMS])

    @queued
    def log_metrics(self, metrics: Mapping[str, float], step: int | None) -> None:
        """Record numbers; without a step they are final values."""
        self.client.log_batch(self.run_id, metrics=metric_entities(metrics, self.time, step or 0))

    @queued
    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags, by which runs can be searched; the end of a long value is cut off."""
        self.client.log_batch(self.run_id, tags=tag_entities(tags))

    def end(self, status: str, error: str | None = None) -> None:
        """End the run; what could not be written so far is written now if the server is back."""
        if error:
            self.tag({"error": error})
        self._set_status(status)
        if self.close():
            holding.forget(MARK, self.queue_id)

    @queued
    def _set_status(self, status: str) -> None:
        self.client.set_terminated(self.run_id, status, end_time=self.time)

    def _find(self) -> bool:
        if not self._id:
            condition = f"tags.`{QUEUE_ID_TAG}` = '{self.queue_id}'"
            runs = self.client.search_runs([self.experiment], condition, max_results=1)
            self._id = str(runs[0].info.run_id) if runs else ""
        return bool(self._id)


class StageRun(OpenRun):
    """The run of one stage; implements `tasks.core.tracking.Recorder`."""

    def __init__(self, queue: Path) -> None:
        super().__init__(queue)
        self._tables: dict[str, list[dict[str, Any]]] = {}

    def log_samples(self, name: str, rows: Sequence[Mapping[str, object]], step: int | None) -> None:
        """Append rows to the table `<name>.json`, the step in the first column; those of the same step are replaced.

        MLflow's own `log_table` only appends, and reads the table back from the server each time.
        """
        if not rows:
            return
        if name not in self._tables:
            files = [{"path": f"{table}.json", "type": "table"} for table in [*self._tables, name]]
            self.tag({TABLES_TAG: json.dumps(files)})
        table = [row for row in self._tables.get(name, []) if row.get("step") != step]
        numbered = [{**({} if step is None else {"step": step}), **row} for row in rows]
        table += [{key: _table_cell(value) for key, value in row.items()} for row in numbered]
        self._tables[name] = table
        columns = list(dict.fromkeys(key for row in table for key in row))
        self._log_table(name, columns, [[row.get(column) for column in columns] for row in table])

    @queued
    def _log_table(self, name: str, columns: list[str], data: list[list[Any]]) -> None:
        self.client.log_dict(self.run_id, {"columns": columns, "data": data}, f"{name}.json")

    @queued
    def log_file(self, path: Path, folder: str | None) -> None:
        """Copy a file into the run's artifacts, unless a later run of the stage has removed it."""
        if Path(path).exists():
            self.client.log_artifact(self.run_id, str(path), folder)

    @queued
    def log_inputs(self, data: Mapping[str, str]) -> None:
        """Record what the stage reads: each file or folder with its DVC md5 as digest."""
        from mlflow.entities import Dataset, DatasetInput

        datasets = [Dataset(path, md5, "local", json.dumps({"uri": path})) for path, md5 in data.items()]
        self.client.log_inputs(self.run_id, datasets=[DatasetInput(item) for item in datasets])

    def log_outputs(self, digests: Mapping[str, str]) -> None:
        """Record each output's md5, and a model reference for a folder of weights: the bytes stay with DVC."""
        self.tag({f"{OUTPUT_TAG}{Path(path).name}": md5 for path, md5 in digests.items()})
        for path, md5 in digests.items():
            if Path(path).name in WEIGHT_DIRS:
                self._log_model(path, md5)

    @queued
    def _log_model(self, path: str, md5: str) -> None:
        from mlflow.entities import LoggedModelOutput

        stage = Path(path).parent.name
        condition = f"tags.`{QUEUE_ID_TAG}` = '{self.queue_id}' and tags.`dvc.path` = '{path}'"
        if known := self.client.search_logged_models([self.experiment], condition):
            model = known[0]
        else:
            tags = {"dvc.path": path, "dvc.md5": md5, STAGE_TAG: stage, QUEUE_ID_TAG: self.queue_id}
            model = self.client.create_logged_model(self.experiment, stage, source_run_id=self.run_id, tags=tags)
        self.client.finalize_logged_model(model.model_id, "READY")
        self.client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step=0)])


def recorded_md5s() -> Iterator[str]:
    """The md5s of inputs and outputs of all runs that have not been deleted (`….dir`: a folder)."""
    client, experiment = open_store()
    token = None
    while True:
        page = client.search_runs([experiment], page_token=token)
        for run in page:
            yield from (value for key, value in run.data.tags.items() if key.startswith(OUTPUT_TAG))
            yield from (item.dataset.digest for item in (run.inputs.dataset_inputs if run.inputs else ()))
        token = page.token
        if not token:
            return


def output_md5s(run_id: str) -> dict[str, dict[str, str]]:
    """Stage → name of its output → md5, of a stage's run, or of a pipeline's; a ConfigError if there is no such run."""
    from mlflow.exceptions import MlflowException

    client, _ = open_store()
    try:
        tags = client.get_run(run_id).data.tags
    except MlflowException as error:
        raise ConfigError(f"MLflow at {store_uri()} has no run {run_id!r}") from error
    if STAGE_TAG in tags:
        md5s = {key.removeprefix(OUTPUT_TAG): md5 for key, md5 in tags.items() if key.startswith(OUTPUT_TAG)}
        return {tags[STAGE_TAG]: md5s}
    runs = [run for key, run in tags.items() if key.endswith(".run")]
    return {stage: md5s for run in runs for stage, md5s in output_md5s(run).items()}


def without_curves(metrics: Mapping[str, float], curves: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The final metrics that are not the last point of a curve."""
    drawn = {column for row in curves for column in row}
    return {metric: value for metric, value in metrics.items() if metric not in drawn}


def git_commit() -> str:
    """The commit that is checked out; empty where there is none."""
    command = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(command, cwd=project_root(), capture_output=True, text=True, check=False)
    return commit.stdout.strip() if commit.returncode == 0 else ""


def new_queue() -> Path:
    """The file of a new run's queue."""
    return _queues_dir() / f"{uuid.uuid4().hex}.jsonl"


def _queues_dir() -> Path:
    return state_dir() / "mlflow_queue"


def _source_tags(name: str) -> dict[str, str]:
    tags = {"mlflow.source.name": name, "mlflow.source.type": "LOCAL", "mlflow.user": os.environ.get("USER", "unknown")}
    commit = git_commit()
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


def _cut(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: value[:TAG_LENGTH] for key, value in tags.items()}


def tag_entities(tags: Mapping[str, str]) -> list[RunTag]:
    from mlflow.entities import RunTag

    return [RunTag(key, value) for key, value in _cut(tags).items()]


def metric_entities(metrics: Mapping[str, float], time: int, step: int) -> list[Metric]:
    from mlflow.entities import Metric

    return [Metric(FORBIDDEN.sub("_", key), float(value), time, step) for key, value in metrics.items()]


def _table_cell(value: Any) -> Any:
    return value if value is None or isinstance(value, str | bool | int | float) else json.dumps(value, default=str)
