"""Variants of the project as it is now: each in a git worktree of its own, all of them with one DVC cache.

What variants have in common is computed by the first and restored for the others. All report to the project's MLflow,
tagged with their series and their settings; what they wrote is in the cache, so `rlhf run -S` with the same settings
brings it into the project itself.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from flows.worktrees import git, run, standing_in, worktree
from tasks.core.errors import StageError
from tasks.core.params import load_params
from tasks.core.paths import project_root, state
from tasks.runtime import mlflow_store, recording, versioning

__all__ = ["begin", "run_variant"]


def begin(kind: str) -> Path:
    """A new folder for a series of variants; its name is that of the series.

    Raises:
        StageError: there is no git commit to start from.
    """
    if not recording.git_commit():
        raise StageError("variants need a git commit to start from: commit the project first")
    folder = state() / kind / f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True)
    return folder


@contextmanager
def run_variant(
    folder: Path, settings: Sequence[str], words: Sequence[str], environment: Mapping[str, str] | None = None
) -> Iterator[Path]:
    """The folder of what the stages wrote with these settings; it is there for as long as this lasts.

    Args:
        folder: of the series.
        settings: `key=value` each.
        words: what to pass to `rlhf run` beside them.
        environment: variables beside this process's.

    Raises:
        RLHFError: what ended the run, or a setting is not valid.
    """
    tags = json.dumps({"sweep": folder.name, "variant": " ".join(settings)})
    own = {"MLFLOW_TRACKING_URI": mlflow_store.store_uri(), recording.SWEEP_VARIABLE: tags}
    with _copy(folder / "worktree") as tree:
        flags = [word for setting in settings for word in ("-S", setting)]
        run(tree, [*words, *flags], {**os.environ, **(environment or {}), **own})
        yield tree / "artifacts"


@contextmanager
def _copy(folder: Path) -> Iterator[Path]:
    """The project as it is now, changes that are not committed included, at another place with the same DVC cache."""
    root = project_root()
    with worktree(folder, "HEAD"):
        changed = git("ls-files", "--modified", "--others", "--exclude-standard", "-z").split("\0")
        for name in filter(None, changed):
            target = folder / name
            if (root / name).exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, target)
            else:
                target.unlink(missing_ok=True)
        versioning.share_cache(folder)
        load_params(folder / "params.yaml")
        with standing_in(folder):
            versioning.pull_data()
        yield folder
