"""What a registered policy was made from: code, parameters, data and every stage's outputs, kept with the version.

It is one tag of the version, so that it needs no file store. MLflow takes 100,000 characters in a tag (65,535 bytes in
a MySQL store); the default pipeline needs 12,000.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.dataclasses import dataclass

from tasks.core.errors import StageError
from tasks.core.params import load_params
from tasks.core.paths import artifacts, project_root
from tasks.runtime import recording, versioning
from tasks.runtime.registry import Version

__all__ = ["ORIGIN", "Finding", "Origin", "StageOrigin", "collect", "origin_of", "restore"]

ORIGIN = "origin"

READ = ("data", "data.dvc", "dvc.yaml", "flows", "infra/presets", "requirements.lock", "tasks")
"""What decides about results and is kept by git; params.yaml is not among it, since its text is part of the origin."""

SHOWN = 20  # changed files that are named; one is enough to know that the commit is not all

SOURCE_KEYS = ("name", "kind", "source", "licence", "rows", "sha256_of_rows")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StageOrigin(_Part):
    """A stage as it was: DVC's key of what it read, the MLflow run that computed it, and its outputs' md5s.

    `run` is empty where the store knows no such run.
    """

    key: str
    run: str
    outputs: dict[str, str]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Finding:
    """One rule of the gate: what was measured, what was asked, and whether it holds."""

    rule: str
    found: str
    asked: str
    holds: bool


class Origin(_Part):
    """Everything that is needed to explain a version, and to make it again.

    Attributes:
        params: the text of params.yaml.
        parameters: what it says, defaults included; nothing here checks it, since it may be older than this code.
        commit: of git; empty where there was none.
        uncommitted: files of code or data that were not as in the commit.
        pipeline_run: MLflow's id.
        base_model: the card of the base model.
        sources: what each data card says of a source.
        figures: the evaluation's rows of the policy and of what it is compared with.
        findings: what the gate found.
    """

    params: str
    parameters: dict[str, Any]
    commit: str
    uncommitted: tuple[str, ...]
    pipeline_run: str
    stages: dict[str, StageOrigin]
    base_model: dict[str, Any]
    sources: list[dict[str, Any]]
    figures: dict[str, dict[str, float]]
    findings: tuple[Finding, ...]

    def md5_of(self, path: str) -> str:
        """The md5 of an output, by its path as in dvc.yaml.

        Raises:
            StageError: no stage wrote it.
        """
        for stage in self.stages.values():
            if path in stage.outputs:
                return stage.outputs[path]
        raise StageError(f"no stage wrote {path} when this version was made")


def collect(flow_run: str, figures: Mapping[str, Mapping[str, float]], findings: tuple[Finding, ...]) -> Origin:
    """The origin of what lies in artifacts now, which this flow run has brought up to date.

    Raises:
        StageError: MLflow does not know the flow's run.
    """
    run, tags = recording.pipeline_tags(flow_run)
    stages = {
        name: StageOrigin(
            key=tags.get(f"{name}.key", ""), run=tags.get(f"{name}.run", ""), outputs=versioning.output_digests(name)
        )
        for name in versioning.graph()
    }
    cards = [_card(path) for path in sorted((artifacts("collect") / "cards").glob("*.json"))]
    params = project_root() / "params.yaml"
    return Origin(
        params=params.read_text(encoding="utf-8"),
        parameters=load_params(params).model_dump(mode="json"),
        commit=recording.git_commit(),
        uncommitted=_uncommitted(),
        pipeline_run=run,
        stages=stages,
        base_model=_card(artifacts("base_model") / "card.json"),
        sources=[{key: card[key] for key in SOURCE_KEYS if key in card} for card in cards],
        figures={policy: dict(row) for policy, row in figures.items()},
        findings=findings,
    )


def origin_of(version: Version) -> Origin:
    """What was kept when the version was registered.

    Raises:
        StageError: nothing was: it is older than this record.
    """
    if ORIGIN not in version.tags:
        raise StageError(
            f"version {version.number} has no record of its origin, only tags; `rlhf retrain` registers with one"
        )
    return Origin.model_validate_json(version.tags[ORIGIN])


def restore(version: Version, folder: Path) -> None:
    """Write the version's weights into the folder, laid out as in artifacts.

    Raises:
        StageError: neither the DVC cache nor a remote has them.
    """
    for path, md5 in version.weights.items():
        versioning.restore(md5, folder / path)


def _card(path: Path) -> dict[str, Any]:
    card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return card


def _uncommitted() -> tuple[str, ...]:
    command = ["git", "status", "--porcelain", "--no-renames", "--", *READ]
    done = subprocess.run(command, cwd=project_root(), capture_output=True, text=True, check=False)
    return tuple(line[3:] for line in done.stdout.splitlines()[:SHOWN])
