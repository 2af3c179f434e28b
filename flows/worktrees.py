"""Other working copies of this project, as git worktrees."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tasks.core.errors import StageError
from tasks.core.paths import project_root

__all__ = ["ROOT_VARIABLE", "git", "run", "worktree"]

ROOT_VARIABLE = "RLHF_ROOT"
"""Says which folder is the project, whatever one stands in: see `tasks.core.paths`."""


@contextmanager
def worktree(folder: Path, commit: str) -> Iterator[Path]:
    """The project at that commit in another folder, with this one's DVC settings; it is removed at the end.

    Raises:
        StageError: git refuses, for example because there is no such commit.
    """
    root = project_root()
    git("worktree", "add", "--detach", "--quiet", str(folder), commit)
    try:
        local = root / ".dvc" / "config.local"
        if local.exists():
            shutil.copy2(local, folder / ".dvc")
        yield folder
    finally:
        with contextlib.suppress(StageError):
            git("worktree", "remove", "--force", str(folder))


def run(tree: Path, words: Sequence[str], environment: Mapping[str, str], failed: str) -> None:
    """`rlhf run` with these words in that working copy, as a process of its own.

    Raises:
        StageError: it failed, with this as the message.
    """
    command = [sys.executable, "-m", "flows.cli", "run", *words]
    own = {**environment, "PYTHONPATH": str(tree), ROOT_VARIABLE: str(tree)}
    done = subprocess.run(command, cwd=tree, env=own, check=False)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise StageError(failed)


def git(*words: str) -> str:
    """What git says of the project.

    Raises:
        StageError: it refuses.
    """
    done = subprocess.run(["git", *words], cwd=project_root(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise StageError(f"`git {' '.join(words[:2])}` failed: {done.stderr.strip()}")
    return done.stdout
