"""Other working copies of this project, as git worktrees."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from flows import offspring
from tasks.core.errors import RLHFError, StageError
from tasks.core.paths import project_root, state_dir

__all__ = ["ROOT_VARIABLE", "git", "run", "standing_in", "tell", "worktree"]

ROOT_VARIABLE = "RLHF_ROOT"
"""Says which folder is the project, whatever one stands in: see `tasks.core.paths`."""

ERROR_VARIABLE = "RLHF_ERROR_FILE"
"""Says where an `rlhf` that runs in a worktree writes the error that ends it."""


@contextmanager
def worktree(folder: Path, commit: str) -> Iterator[Path]:
    """The project at that commit in another folder, with this one's DVC settings; it is removed at the end.

    Those that a killed process has left are removed first.

    Raises:
        StageError: git refuses, for example because there is no such commit.
    """
    root = project_root()
    _remove_left()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _in_use(folder):
        git("worktree", "add", "--detach", "--quiet", str(folder), commit)
        try:
            local = root / ".dvc" / "config.local"
            if local.exists():
                shutil.copy2(local, folder / ".dvc")
            yield folder
        finally:
            _remove(folder)


def run(tree: Path, words: Sequence[str], environment: Mapping[str, str]) -> None:
    """`rlhf run` with these words in that working copy, as a process of its own.

    Raises:
        RLHFError: what ended it.
    """
    command = [sys.executable, "-m", "flows.cli", "run", *words]
    told = tree / ".rlhf" / "error.json"
    own = {**environment, "PYTHONPATH": str(tree), ROOT_VARIABLE: str(tree), ERROR_VARIABLE: str(told)}
    done = subprocess.run(command, cwd=tree, env=own, check=False)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode and told.is_file():
        raise offspring.error_from(json.loads(told.read_text(encoding="utf-8")), "{}")
    if done.returncode:
        raise StageError(f"`rlhf run` ended with status {done.returncode}, see above")


def tell(error: RLHFError) -> None:
    """In such a process: the error that ends it, for the one that started it."""
    if path := os.environ.get(ERROR_VARIABLE):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(json.dumps(offspring.plain_error(error)), encoding="utf-8")


@contextmanager
def standing_in(tree: Path) -> Iterator[None]:
    """Within it, that is the project."""
    before = os.environ.get(ROOT_VARIABLE)
    os.environ[ROOT_VARIABLE] = str(tree)
    try:
        with contextlib.chdir(tree):
            yield
    finally:
        del os.environ[ROOT_VARIABLE]
        if before is not None:
            os.environ[ROOT_VARIABLE] = before


def git(*words: str) -> str:
    """What git says of the project.

    Raises:
        StageError: it refuses.
    """
    done = subprocess.run(["git", *words], cwd=project_root(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise StageError(f"`git {' '.join(words[:2])}` failed: {done.stderr.strip()}")
    return done.stdout


def _remove(tree: Path) -> None:
    with contextlib.suppress(StageError):  # another process may have done it
        git("worktree", "remove", "--force", str(tree))


@contextmanager
def _in_use(folder: Path) -> Iterator[None]:
    """A lock of the operating system's, which goes with this process, however it ends."""
    path = _lock(folder)
    with FileLock(path, timeout=0):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _remove_left() -> None:
    """Remove the project's own worktrees that no process works in any more, and what git remembers of others."""
    git("worktree", "prune")
    lines = git("worktree", "list", "--porcelain").splitlines()
    trees = [Path(line.removeprefix("worktree ")) for line in lines if line.startswith("worktree ")]
    for tree in trees:
        if tree.is_relative_to(state_dir()) and not _is_used(tree):
            _remove(tree)
            _lock(tree).unlink(missing_ok=True)


def _is_used(tree: Path) -> bool:
    """Whether the process that made it still lives, or a run that this one has left behind there."""
    try:
        for path in (_lock(tree), tree / ".rlhf" / "run.lock"):
            path.parent.mkdir(exist_ok=True)
            with FileLock(path, timeout=0):
                pass
    except Timeout:
        return True
    return False
