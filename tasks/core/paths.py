"""Paths of the project, all derived from its root."""

import os
from pathlib import Path

from tasks.core.errors import ConfigError, StageError

__all__ = ["DISABLED_MARKER", "Artifacts", "checkpoint_dir", "project_root", "stage_dir", "state_dir"]

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


class Artifacts:
    """The folders that a stage works with: `artifacts.sft` is stage sft's, `artifacts.out` its own.

    It knows only the stages that dvc.yaml names in the stage's deps, so a stage cannot read what DVC does not hash.
    """

    def __init__(self, *, out: Path, **read: Path) -> None:
        self.out = out
        self._read = read

    def __getattr__(self, stage: str) -> Path:
        if stage.startswith("_"):
            raise AttributeError(stage)
        try:
            return self._read[stage]
        except KeyError:
            raise StageError(
                f"this stage reads artifacts/{stage}: name what it reads there in its deps in dvc.yaml"
            ) from None
