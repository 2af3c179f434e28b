"""Where things are. Every path of the project is derived from its root here."""

from __future__ import annotations

import os
from pathlib import Path

from tasks.core.errors import ConfigError

__all__ = ["DISABLED_MARKER", "stage_dir", "checkpoint_dir", "project_root", "state_dir"]

DISABLED_MARKER = "OFF"
"""A file of this name stands for the content of an output folder of a stage that is off."""


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
    """The folder that holds everything the stage writes for other stages."""
    return project_root() / "artifacts" / stage


def state_dir() -> Path:
    """The folder for what is neither source nor artifact (downloads, checkpoints); git and DVC ignore it."""
    return project_root() / ".rlhf"


def checkpoint_dir(stage: str, key: str) -> Path:
    """Where a stage keeps its checkpoints for one key: outside DVC's outs, which DVC deletes before a run."""
    return state_dir() / "checkpoints" / stage / key
