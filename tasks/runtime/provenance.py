"""Provenance of a registered policy: the code, parameters, data and stage outputs that made it.

It is one tag of the version, so that it needs no file store. MLflow takes 100,000 characters in a tag (65,535 bytes in
a MySQL store); the default pipeline needs 12,000.
"""

import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.dataclasses import dataclass

from tasks.config.params import load_params
from tasks.core.errors import StageError
from tasks.core.paths import project_root, stage_dir
from tasks.runtime import dvc_repo, dvc_stages, mlflow_pipeline, mlflow_runs
from tasks.runtime.registry import Version

__all__ = [
    "PROVENANCE_TAG", "Provenance", "RuleResult", "StageRecord", "collect_provenance", "provenance_of",
    "restore_weights", "weight_digests",
]  # fmt: skip

PROVENANCE_TAG = "provenance"

TRACKED_PATHS = ("custom", "data", "data.dvc", "dvc.yaml", "flows", "infra/presets", "requirements.lock", "tasks")
"""What decides about results and is kept by git; the text of params.yaml is part of the provenance itself."""

MAX_LISTED_FILES = 20  # changed files that are named; one is enough to know that the commit is not all

SOURCE_KEYS = ("name", "kind", "source", "licence", "rows", "sha256_of_rows")


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StageRecord(_Frozen):
    """A stage when the version was registered: its DVC key, its MLflow run, its outputs' md5s, and where it ran.

    `run` and `machine` (see `describe_machine`) are empty where the store knows no run that computed it.
    """

    key: str
    run: str
    outputs: dict[str, str]
    machine: dict[str, str] = {}


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class RuleResult:
    """The result of one rule of the gate: what was measured, what was required, and whether it passed."""

    rule: str
    measured: str
    required: str
    passed: bool


class Provenance(_Frozen):
    """Everything that is needed to explain a version, and to make it again.

    Attributes:
        params: the text of params.yaml.
        parameters: what it says, defaults included; nothing here checks it, since it may be older than this code.
        commit: of git; empty where there was none.
        uncommitted: files of code or data that were not as in the commit.
        pipeline_run: MLflow's id.
        sources: what each data card says of a source.
        metrics: the evaluation's rows of the policy and of what it is compared with.
    """

    params: str
    parameters: dict[str, Any]
    commit: str
    uncommitted: tuple[str, ...]
    pipeline_run: str
    stages: dict[str, StageRecord]
    base_model: dict[str, Any]
    sources: list[dict[str, Any]]
    metrics: dict[str, dict[str, float]]
    rule_results: tuple[RuleResult, ...]

    def md5_of(self, path: str) -> str:
        """The md5 of an output, by its path as in dvc.yaml; a StageError if no stage wrote it."""
        for stage in self.stages.values():
            if path in stage.outputs:
                return stage.outputs[path]
        raise StageError(f"no stage wrote {path} when this version was made")

    def machine_facts(self) -> dict[str, str]:
        """What the stages' records of machines hold; where stages differ, each value once."""
        records = [stage.machine for stage in self.stages.values()]
        keys = dict.fromkeys(key for record in records for key in record)
        return {key: ", ".join(sorted({record[key] for record in records if key in record})) for key in keys}


def collect_provenance(
    flow_run: str, metrics: Mapping[str, Mapping[str, float]], rule_results: tuple[RuleResult, ...]
) -> Provenance:
    """Collect the provenance of artifacts, which this flow run wrote; a StageError if MLflow does not know the run."""
    run, tags = mlflow_pipeline.pipeline_tags(flow_run)
    stages = {}
    for name in dvc_stages.graph():
        key, stage_run = (tags.get(f"{name}.{field}", "") for field in ("key", "run"))
        machine = json.loads(tags.get(f"{name}.machine", "{}"))
        outputs = dvc_stages.output_digests(name)
        stages[name] = StageRecord(key=key, run=stage_run, outputs=outputs, machine=machine)
    cards = [_read_card(path) for path in sorted((stage_dir("collect") / "cards").glob("*.json"))]
    params = project_root() / "params.yaml"
    return Provenance(
        params=params.read_text(encoding="utf-8"),
        parameters=load_params(params).model_dump(mode="json"),
        commit=mlflow_runs.git_commit(),
        uncommitted=_uncommitted(),
        pipeline_run=run,
        stages=stages,
        base_model=_read_card(stage_dir("base_model") / "card.json"),
        sources=[{key: card[key] for key in SOURCE_KEYS if key in card} for card in cards],
        metrics={policy: dict(row) for policy, row in metrics.items()},
        rule_results=rule_results,
    )


def provenance_of(version: Version) -> Provenance:
    """Read the provenance from when the version was registered; a StageError if it has none."""
    if PROVENANCE_TAG not in version.tags:
        raise StageError(f"version {version.number} has no provenance, only tags; `rlhf retrain` registers with one")
    return Provenance.model_validate_json(version.tags[PROVENANCE_TAG])


def weight_digests(stages: Iterable[str]) -> dict[str, str]:
    """Map every folder of weights that these stages wrote, as `stage/folder`, to its md5."""
    return {
        f"{stage}/{Path(path).name}": md5
        for stage in stages
        for path, md5 in dvc_stages.output_digests(stage).items()
        if Path(path).name in mlflow_runs.WEIGHT_DIRS
    }


def restore_weights(version: Version, folder: Path) -> None:
    """Write the version's weights into the folder, laid out as in artifacts; a StageError if DVC has none."""
    for path, md5 in version.weights.items():
        dvc_repo.restore(md5, folder / path)


def _read_card(path: Path) -> dict[str, Any]:
    card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return card


def _uncommitted() -> tuple[str, ...]:
    command = ["git", "status", "--porcelain", "--no-renames", "--", *TRACKED_PATHS]
    done = subprocess.run(command, cwd=project_root(), capture_output=True, check=False)
    return tuple(line[3:] for line in done.stdout.decode(errors="replace").splitlines()[:MAX_LISTED_FILES])
