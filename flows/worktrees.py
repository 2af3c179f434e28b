"""Other working copies of this project, as git worktrees."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from flows.processes import run_python
from tasks.core.errors import StageError
from tasks.core.paths import project_root, state_dir
from tasks.runtime import holding

__all__ = ["as_project_root", "git", "remove_stale", "run_rlhf", "stale_worktrees", "worktree", "worktrees"]

ROOT_VARIABLE = "RLHF_ROOT"  # see `tasks.core.paths`


@contextmanager
def worktree(folder: Path, commit: str) -> Iterator[Path]:
    """The project at that commit in another folder, with this one's DVC settings; it is removed at the end.

    Those that a killed process has left are removed first. A StageError if git refuses, as for an unknown commit.
    """
    root = project_root()
    remove_stale()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _hold_lock(folder):
        git("worktree", "add", "--detach", "--quiet", str(folder), commit)
        try:
            local = root / ".dvc" / "config.local"
            if local.exists():
                shutil.copy2(local, folder / ".dvc")
            yield folder
        finally:
            _remove(folder)


def run_rlhf(tree: Path, args: Sequence[str], environment: Mapping[str, str]) -> None:
    """`rlhf run` with these arguments in that working copy, in its own process; raises the RLHFError that ended it."""
    variables = {**environment, "PYTHONPATH": str(tree), ROOT_VARIABLE: str(tree)}
    command = ["-c", "from flows.cli.main import main; main()", "run"]  # older commits have no `-m flows.cli.main`
    run_python([*command, *args], "`rlhf run`", cwd=tree, environment=variables)


@contextmanager
def as_project_root(tree: Path) -> Iterator[None]:
    """Temporarily make `tree` the project root of this process."""
    before = os.environ.get(ROOT_VARIABLE)
    os.environ[ROOT_VARIABLE] = str(tree)
    try:
        with contextlib.chdir(tree):
            yield
    finally:
        del os.environ[ROOT_VARIABLE]
        if before is not None:
            os.environ[ROOT_VARIABLE] = before


def git(*args: str) -> str:
    """The output of git in the project; a StageError if it refuses."""
    done = subprocess.run(["git", *args], cwd=project_root(), capture_output=True, check=False)
    if done.returncode:
        raise StageError(f"`git {' '.join(args[:2])}` failed: {os.fsdecode(done.stderr).strip()}")
    return os.fsdecode(done.stdout)  # names of files, whatever the locale


def _remove(tree: Path) -> None:
    with contextlib.suppress(StageError):  # another process may have done it
        git("worktree", "remove", "--force", str(tree))


@contextmanager
def _hold_lock(folder: Path) -> Iterator[None]:
    """A lock of the operating system's, which goes with this process, however it ends."""
    path = _lock_file(folder)
    with FileLock(path, timeout=0):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def remove_stale() -> None:
    """Remove the project's worktrees that no process uses, and git's records of missing ones."""
    git("worktree", "prune")
    for tree in stale_worktrees():
        _remove(tree)
        _lock_file(tree).unlink(missing_ok=True)


def stale_worktrees() -> list[Path]:
    """Worktrees of variants that a killed process has left."""
    return [tree for tree in worktrees() if tree.is_relative_to(state_dir()) and not _is_locked(tree)]


def worktrees() -> list[Path]:
    """Every working copy of the project beside this one that is there."""
    lines = git("worktree", "list", "--porcelain").splitlines()
    trees = [Path(line.removeprefix("worktree ")) for line in lines if line.startswith("worktree ")]
    return [tree for tree in trees if tree != project_root() and tree.exists()]


def _is_locked(tree: Path) -> bool:
    """Whether the process that made the worktree still lives, or a run in it."""
    paths = (_lock_file(tree), tree / ".rlhf" / "run.lock")
    for path in paths:
        path.parent.mkdir(exist_ok=True)
    return any(map(holding.is_locked, paths))
