"""What is said of a run of MLflow, done to it. Each deed may be done twice without harm: see `tasks.runtime.outbox`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.core.errors import StageError
from tasks.runtime.mlflow_store import open_store, store_uri

__all__ = ["KEY_TAG", "STAGE_TAG", "Deeds"]

STAGE_TAG, KEY_TAG = "rlhf.stage", "rlhf.key"

OUTBOX_TAG = "rlhf.outbox"
"""A run's own name, by which it is found again when MLflow's answer to its creation was lost."""

# How MLflow's page knows that a file is a table (mlflow.client.MlflowClient.log_table writes it).
TABLES_TAG = "mlflow.loggedArtifacts"

BATCH = 100  # mlflow.utils.validation: at most this many parameters per request


class Deeds:
    """Those of one run, which `create` begins; a method without its underscore is a deed's name."""

    def __init__(self, name: str) -> None:
        self._client, self.experiment = open_store()
        self._name = name
        self._run_id: str | None = None

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

    def do(self, deed: str, content: Mapping[str, Any]) -> None:
        """Do it now.

        Raises:
            Exception: whatever MLflow raises.
        """
        getattr(self, f"_{deed}")(**content)

    def _create(self, name: str, tags: Mapping[str, str], time: int) -> None:
        try:
            found = self.run_id
        except StageError:
            run = self._client.create_run(
                self.experiment, start_time=time, run_name=name, tags={**tags, OUTBOX_TAG: self._name}
            )
            found = str(run.info.run_id)
        self._run_id = found

    def _params(self, parameters: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in parameters.items()]
        for start in range(0, len(params), BATCH):
            self._client.log_batch(self.run_id, params=params[start : start + BATCH])

    def _metrics(self, metrics: Mapping[str, float], step: int, time: int) -> None:
        from mlflow.entities import Metric

        self._client.log_batch(self.run_id, metrics=[Metric(key, value, time, step) for key, value in metrics.items()])

    def _tag(self, key: str, value: str) -> None:
        self._client.set_tag(self.run_id, key, value)

    def _end(self, status: str, time: int) -> None:
        self._client.set_terminated(self.run_id, status, end_time=time)

    def _origin(self, name: str, key: str) -> None:
        condition = f"tags.`{KEY_TAG}` = '{key}' and attributes.status = 'FINISHED'"
        if runs := self._client.search_runs([self.experiment], condition, max_results=1):
            self._client.set_tag(self.run_id, f"{name}.run", runs[0].info.run_id)

    def _samples(self, name: str, rows: Sequence[Mapping[str, Any]], step: int | None) -> None:
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

    def _file(self, path: str, folder: str | None) -> None:
        if Path(path).exists():  # a later run may have replaced it
            self._client.log_artifact(self.run_id, path, folder)

    def _inputs(self, data: Mapping[str, str]) -> None:
        from mlflow.entities import Dataset, DatasetInput

        sets = [Dataset(path, md5, "local", json.dumps({"uri": path})) for path, md5 in data.items()]
        self._client.log_inputs(self.run_id, datasets=[DatasetInput(item) for item in sets])

    def _model(self, path: str, md5: str) -> None:
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
