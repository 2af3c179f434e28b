"""What nothing in the project refers to any more, and removing it: see `rlhf gc`."""

import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.core.errors import StageError
from tasks.core.paths import project_root, state_dir
from tasks.runtime import dvc_repo, dvc_stages, mlflow_runs, registry
from tasks.runtime.provenance import PROVENANCE_TAG

__all__ = ["Garbage", "collect_garbage"]

SHA256 = re.compile(r"\b[0-9a-f]{64}\b")
MD5 = re.compile(r"\b[0-9a-f]{32}(?:\.dir)?\b")


@dataclass(frozen=True)
class Garbage:
    """Files or folders of one kind that nothing refers to. `kept_for` says what would have kept them."""

    kind: str
    kept_for: str
    paths: tuple[Path, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        files = (file for path in self.paths for file in (path, *path.rglob("*")) if not file.is_symlink())
        return sum(file.stat().st_size for file in files if file.is_file())

    def remove(self) -> None:
        """Delete it."""
        for path in self.paths:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def collect_garbage(worktrees: Sequence[Path]) -> list[Garbage]:
    """What could be freed, a row for each kind; call it, and free them, under `dvc_repo.locked`.

    Args:
        worktrees: other working copies of the project, whose outputs may lie in the same cache.

    Raises:
        StageError: MLflow does not know all runs yet, so what they refer to is not known.
        ConfigError: its store cannot be opened.
    """
    mlflow_runs.connect()
    state = state_dir()
    if any((state / "mlflow_queue").glob("*.jsonl")):
        raise StageError("MLflow has not recorded some runs yet, so what they refer to is not known: start its server")
    used = "dvc.lock, branches, tags, runs and versions in MLflow"
    return [
        Garbage("DVC cache", used, tuple(dvc_repo.unused_objects(set(_referenced_md5s()), worktrees))),
        Garbage("checkpoints", "a stage that would go on from it", tuple(_unused_checkpoints())),
        Garbage("downloads", "a source or model of params.yaml", tuple(_unused_downloads(state / "downloads"))),
        Garbage("MLflow queue", "runs that MLflow will still take", tuple((state / "mlflow_queue").glob("*.refused"))),
    ]


def _referenced_md5s() -> Iterator[str]:
    """Every md5 that a run in MLflow or a registered version names."""
    yield from mlflow_runs.recorded_md5s()
    for version in registry.versions():
        yield from version.weights.values()
        yield from MD5.findall(" ".join((version.tags.get("data.md5", ""), version.tags.get(PROVENANCE_TAG, ""))))


def _unused_checkpoints() -> Iterator[Path]:
    stages: Collection[str] = dvc_stages.graph()
    for folder in (state_dir() / "checkpoints").glob("*/*"):
        name = folder.parent.name
        key = dvc_stages.stage_key(name) if name in stages else ""
        if key is not None and key != folder.name:  # without its inputs a stage has no key
            yield folder


def _unused_downloads(folder: Path) -> Iterator[Path]:
    """Downloads whose checksum params.yaml does not name, and those that broke off."""
    named = SHA256.findall((project_root() / "params.yaml").read_text(encoding="utf-8"))
    yield from (path for path in folder.glob("*") if path.name not in named)
