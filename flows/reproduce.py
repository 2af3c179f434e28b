"""A registered policy computed again from nothing: its commit, its parameters, its data, and an empty cache.

That takes as long as it took. The worktree has a DVC cache and an MLflow store of its own and is removed at the end.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from flows.worktrees import git, run, standing_in, worktree
from tasks.core.errors import RLHFError, StageError
from tasks.core.paths import state
from tasks.runtime import versioning
from tasks.runtime.provenance import Origin, origin_of
from tasks.runtime.registry import Version

__all__ = ["Remade", "reproduce", "same_libraries"]


@dataclass(frozen=True)
class Remade:
    """A folder of weights as it was registered, and as it came out now."""

    path: str
    registered: str
    reproduced: str

    @property
    def equal(self) -> bool:
        """Every byte is the same."""
        return self.registered == self.reproduced


def reproduce(version: Version) -> list[Remade]:
    """Compute the policy and all that it needs again, and compare the weights.

    Raises:
        StageError: what it was made from is not all known or not here, or a stage failed.
    """
    origin = origin_of(version)
    _refuse_unknown_code(version, origin)
    folder = state() / "reproduce" / f"{version.number}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    try:
        with worktree(folder, origin.commit) as tree:
            (tree / "params.yaml").write_text(origin.params, encoding="utf-8")
            _bring_data(tree)
            own = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
            _run(tree, version, own)
            made = _weights(tree, version)
    finally:
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
    return [Remade(path, md5, made[path]) for path, md5 in version.weights.items()]


def same_libraries(version: Version) -> bool:
    """Whether requirements.lock is what it was: other versions of libraries may give other bytes."""
    return not git("diff", "--name-only", origin_of(version).commit, "--", "requirements.lock")


def _refuse_unknown_code(version: Version, origin: Origin) -> None:
    name = f"version {version.number}"
    if not origin.commit:
        raise StageError(f"{name} was made where git had no commit, so its code is not known: commit, then retrain")
    if origin.uncommitted:
        files = ", ".join(origin.uncommitted)
        raise StageError(
            f"{name} was made with changes that were not committed ({files}), so its code or data is not known; "
            "commit first, then `rlhf retrain` registers versions that can be made again"
        )
    try:
        git("cat-file", "-e", f"{origin.commit}^{{commit}}")
    except StageError as error:
        raise StageError(f"{name} was made at commit {origin.commit}, which is not here: `git fetch` it") from error


def _run(tree: Path, version: Version, environment: Mapping[str, str]) -> None:
    try:
        run(tree, [version.policy], environment)
    except RLHFError as error:
        raise StageError(f"version {version.number} could not be computed again: {error}") from error


def _bring_data(tree: Path) -> None:
    """What `dvc add` tracks comes from this project's cache or remote; from then on the cache is an empty one."""
    versioning.share_cache(tree)
    with standing_in(tree):
        versioning.pull_data()
    versioning.separate_cache(tree)


def _weights(tree: Path, version: Version) -> dict[str, str]:
    with standing_in(tree):
        return {
            f"{stage}/{Path(path).name}": md5
            for stage in {path.partition("/")[0] for path in version.weights}
            for path, md5 in versioning.output_digests(stage).items()
        }
