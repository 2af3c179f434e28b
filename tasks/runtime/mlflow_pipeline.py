"""The parent run of a flow in MLflow, one row that compares whole pipelines: its name, numbers, curves and tags."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.core.errors import ConfigError, StageError
from tasks.runtime.mlflow_runs import (
    FLOW_TAG,
    FLOW_VAR,
    KEY_TAG,
    MACHINE_TAG,
    PIPELINE_VAR,
    STAGE_TAG,
    OpenRun,
    connect,
    metric_entities,
    new_queue,
    recorded,
    tag_entities,
    without_curves,
)
from tasks.runtime.mlflow_store import EXPERIMENT_ID_VAR, is_unavailable, open_store, queued, store_uri, warn

if TYPE_CHECKING:
    from mlflow.entities import Run

    from tasks.runtime.stage_runner import Outcome

__all__ = ["SWEEP_VAR", "PipelineRun", "add_to_pipeline", "export_run_ids", "pipeline_run", "pipeline_tags"]

SWEEP_VAR = "RLHF_SWEEP"
"""A JSON object with `sweep` and `variant`: the series of runs that a sweep's pipeline runs belong to."""

MAX_METRICS = 1000  # a request: mlflow.utils.validation

CURVES = ("loss", "eval_loss", "reward", "kl", "entropy", "length")
"""Columns of a stage's history that the pipeline's run has, too."""

CHANGED = re.compile(r"(?:^|; )([\w.]+): [^;]* → ([^;]*)")
"""A parameter among the reasons of a stage, and its new value."""

NAMED = 3  # changes in the name of a pipeline's run


@contextmanager
def pipeline_run(flow_run_id: str, parameters: Mapping[str, object]) -> Iterator[PipelineRun]:
    """The parent run of everything that one flow executes."""
    swept = {f"rlhf.{key}": value for key, value in json.loads(os.environ.get(SWEEP_VAR, "{}")).items()}
    pipeline, name = PipelineRun(new_queue()), swept.get("rlhf.variant", "pipeline")
    try:
        with recorded(pipeline, name, "pipeline", {FLOW_TAG: flow_run_id, **swept}, parameters):
            yield pipeline
            pipeline.name_by_changes()
    finally:
        with contextlib.suppress(ConfigError):  # still away
            connect()


@contextmanager
def export_run_ids(pipeline: PipelineRun, flow_run_id: str) -> Iterator[None]:
    """While this lasts, stages that run here or in a child become children of the pipeline run."""
    variables = {PIPELINE_VAR: pipeline.run_id, FLOW_VAR: flow_run_id, EXPERIMENT_ID_VAR: pipeline.experiment}
    os.environ.update(variables)
    try:
        yield
    finally:
        for variable in variables:
            del os.environ[variable]


class PipelineRun(OpenRun):
    """The parent run: one row that compares whole pipelines."""

    def __init__(self, queue: Path) -> None:
        super().__init__(queue)
        self._executed, self._changes = False, dict[str, str]()

    def log_stage(self, outcome: Outcome) -> None:
        """Copy a stage's curves as `<stage>/<metric>`, other final metrics as `<stage>.<metric>`, and tag their run.

        The tag `<stage>.run` names the newest finished run of the same key, if this store has one: a cached stage's.
        `<stage>.machine` is that run's `rlhf.machine`.
        """
        name, curves = outcome.stage, outcome.curves
        final = without_curves(outcome.metrics, curves).items()
        self.log_metrics({f"{name}.{metric}": value for metric, value in final if math.isfinite(value)}, None)
        self._log_curves(
            name, [{column: row[column] for column in ("step", *CURVES) if column in row} for row in curves]
        )
        self.tag({f"{name}.{key}": getattr(outcome, key) for key in ("key", "result", "reason")})
        self._link_stage(name, outcome.key)
        self._executed |= outcome.result == "executed"
        self._changes |= {key.rpartition(".")[2]: value.strip('"') for key, value in CHANGED.findall(outcome.reason)}

    def name_by_changes(self) -> None:
        """Name the run by the parameters that made its stages run, and say so in the tag `rlhf.why`."""
        changes = [f"{key}={value}" for key, value in self._changes.items()]
        why = ", ".join(changes) or ("code or data changed" if self._executed else "nothing changed")
        more = [f"+{len(changes) - NAMED}"] if len(changes) > NAMED else []
        name = (" ".join([*changes[:NAMED], *more]) or "pipeline") + ("" if self._executed else ", cached")
        self.tag({"rlhf.why": why} | ({} if SWEEP_VAR in os.environ else {"mlflow.runName": name}))

    @queued
    def _log_curves(self, name: str, rows: list[dict[str, float]]) -> None:
        points = [
            metric
            for row in rows
            for metric in metric_entities(
                {f"{name}/{key}": row[key] for key in row if key != "step"}, self.time, int(row["step"])
            )
        ]
        for start in range(0, len(points), MAX_METRICS):
            self.client.log_batch(self.run_id, metrics=points[start : start + MAX_METRICS])

    @queued
    def _link_stage(self, name: str, key: str) -> None:
        condition = f"tags.`{KEY_TAG}` = '{key}' and attributes.status = 'FINISHED'"
        if runs := self.client.search_runs([self.experiment], condition, max_results=1):
            self.client.set_tag(self.run_id, f"{name}.run", runs[0].info.run_id)
            self.client.set_tag(self.run_id, f"{name}.machine", runs[0].data.tags.get(MACHINE_TAG, "{}"))


def add_to_pipeline(flow_run_id: str, tags: Mapping[str, str], metrics: Mapping[str, float] = {}) -> None:
    """Add tags and final numbers to a pipeline run that has ended; a warning where MLflow is away."""
    client, _ = open_store()
    final = metric_entities(metrics, int(time.time() * 1000), 0)
    try:
        for run in _pipeline_runs(flow_run_id):
            client.log_batch(run.info.run_id, metrics=final, tags=tag_entities(tags))
    except Exception as error:
        if not is_unavailable(error):
            raise
        warn(f"away or locked, so its pipeline run lacks {', '.join([*tags, *metrics])}")


def pipeline_tags(flow_run_id: str) -> tuple[str, dict[str, str]]:
    """MLflow's id and tags of a flow's pipeline run (see `PipelineRun.log_stage`); a StageError if it is not there."""
    for run in _pipeline_runs(flow_run_id):
        return run.info.run_id, dict(run.data.tags)
    raise StageError(f"MLflow at {store_uri()} does not know the pipeline run of {flow_run_id}: was it away?")


def _pipeline_runs(flow_run_id: str) -> list[Run]:
    client, experiment = open_store()
    runs = client.search_runs([experiment], f"tags.`{FLOW_TAG}` = '{flow_run_id}'")
    return [run for run in runs if STAGE_TAG not in run.data.tags]
