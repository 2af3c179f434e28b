"""Runs of MLflow: one per executed stage, one parent run per flow.

Everything goes through `MlflowClient` with explicit run ids: MLflow's active run belongs to a thread, and a trainer's
threads are not ours.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.errors import ConfigError, StageError
from tasks.core.paths import project_root, state
from tasks.runtime.deeds import KEY_TAG, STAGE_TAG, Deeds
from tasks.runtime.mlflow_store import EXPERIMENT_ID_VAR, is_unavailable, open_store, store_uri
from tasks.runtime.outbox import Outbox, deliver_left

if TYPE_CHECKING:
    from tasks.runtime.versioning import Inputs

__all__ = [
    "SWEEP_VAR",
    "WEIGHT_DIRS",
    "PipelineRun",
    "StageRun",
    "connect",
    "export_run_ids",
    "git_commit",
    "log_pipeline_metrics",
    "pipeline_run",
    "pipeline_tags",
    "stage_run",
    "tag_pipeline",
]

FLOW_TAG = "prefect.flow_run_id"

OUTBOX = "outbox"

# How a flow tells the stages it runs, in this process or in a child, which runs they belong to.
PIPELINE_VARIABLE, FLOW_VARIABLE = "RLHF_PIPELINE_RUN_ID", "RLHF_FLOW_RUN_ID"

SWEEP_VAR = "RLHF_SWEEP"
"""How a sweep tells its pipeline runs what they belong to: a JSON object with `sweep` and `variant`."""

WEIGHT_DIRS = ("adapter", "model")
"""Names of the folders of weights among a stage's outputs."""

# mlflow.utils.validation: a tag not much longer, and no such characters in the name of a metric or parameter.
TAG_LENGTH = 5000
FORBIDDEN = re.compile(r"[^\w\-. /:]")


def connect() -> None:
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
    swept = {f"rlhf.{key}": value for key, value in json.loads(os.environ.get(SWEEP_VAR, "{}")).items()}
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
def export_run_ids(pipeline: PipelineRun, flow_run_id: str) -> Iterator[None]:
    """While this lasts, stages that run here or in a child become children of the pipeline run."""
    told = {
        PIPELINE_VARIABLE: pipeline.run_id,
        FLOW_VARIABLE: flow_run_id,
        EXPERIMENT_ID_VAR: pipeline.experiment,
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


def log_pipeline_metrics(flow_run_id: str, metrics: Mapping[str, float]) -> None:
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
    """A run that is open. Whatever is said of it goes through an outbox, since a server may be away for a while."""

    def __init__(self, outbox: Path) -> None:
        self._deeds = Deeds(outbox.stem)
        self.experiment = self._deeds.experiment
        self.outbox = Outbox(outbox, self._deeds.do, is_unavailable, _warn)

    @property
    def run_id(self) -> str:
        """MLflow's id of this run.

        Raises:
            StageError: the run could not be created yet, because the server is away.
        """
        return self._deeds.run_id

    def create(self, name: str, tags: Mapping[str, str]) -> None:
        """Begin."""
        short = {key: value[:TAG_LENGTH] for key, value in tags.items()}
        self.outbox.put("create", name=name, tags=short, time=_now())

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


class PipelineRun(_Run):
    """The parent run: one row that compares whole pipelines."""

    def log_stage(self, name: str, key: str, result: str, reason: str, metrics: Mapping[str, float]) -> None:
        """Copy a stage's final metrics as `<stage>.<metric>`, and say which run they come from.

        The numbers are those on disk, which DVC has verified to be the stage's; a cached stage has no run of its own
        here, so the tag `<stage>.run` names the newest finished run of the same key, if this store has one.
        """
        self.log_metrics({f"{name}.{metric}": value for metric, value in metrics.items() if math.isfinite(value)}, None)
        self.tag(f"{name}.key", key)
        self.tag(f"{name}.result", result)
        self.tag(f"{name}.why", reason)
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
            if Path(path).name in WEIGHT_DIRS:
                self.outbox.put("model", path=path, md5=md5)


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
