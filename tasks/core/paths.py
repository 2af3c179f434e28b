"""Paths of the project, all derived from its root."""

from __future__ import annotations

import os
from pathlib import Path

from tasks.core.errors import ConfigError

__all__ = ["DISABLED_MARKER", "checkpoint_dir", "project_root", "stage_dir", "state_dir"]

DISABLED_MARKER = "OFF"
"""Name of the only file in an output folder of a stage that is switched off."""


def project_root() -> Path:
    """The folder that holds dvc.yaml: `$RLHF_ROOT`, else the nearest one at or above the working directory.

    Raises:
        ConfigError: no dvc.yaml there.
    """
    start = Path(os.environ.get("RLHF_ROOT", Path.cwd())).resolve()
    for folder in (start, *start.parents):
        if (folder / "dvc.yaml").is_file():
            return folder
    raise ConfigError(f"no dvc.yaml at or above {start}: run this inside the project, or set RLHF_ROOT to it")


def stage_dir(stage: str) -> Path:
    """The folder of a stage's outputs."""
    return project_root() / "artifacts" / stage


def state_dir() -> Path:
    """The folder for local state (downloads, checkpoints), ignored by git and DVC."""
    return project_root() / ".rlhf"


def checkpoint_dir(stage: str, key: str) -> Path:
    """A stage's checkpoint folder for one key: outside DVC's outs, which DVC deletes before a run."""
    return state_dir() / "checkpoints" / stage / key
