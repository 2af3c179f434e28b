"""Running one stage through DVC.

`reproduce` is what `dvc repro --single-item` does, with two things replaced. Where DVC would start `python -m
tasks.sft` as a child, a function of ours is called in this process, so that torch and transformers are imported once.
And dvc.lock is written whole or not at all. Locks, the decision whether anything changed, the run-cache, removing and
hashing outputs, and the content of dvc.lock stay DVC's.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

import dvc.dvcfile
import dvc.stage.run
from dvc.exceptions import DvcException
from dvc.lock import LockError
from dvc.repo import Repo
from dvc_data.hashfile import load

from tasks.core.errors import StageError
from tasks.core.paths import project_root
from tasks.runtime.dvc_repo import describe_error, error_chain, load_stage, quiet_logger, remote_error

__all__ = ["Result", "reproduce"]

Result = Literal["executed", "restored", "unchanged"]
Job = Callable[[], None]

LOCK_POLL_SECONDS = 1.0

_job: ContextVar[Job | None] = ContextVar("job", default=None)


def reproduce(
    name: str, job: Job, *, force: bool = False, pull: bool = False, on_wait: Callable[[str], None] | None = None
) -> Result:
    """Bring one stage up to date by calling `job`, unless DVC finds that it is, or restores it from its run-cache.

    Another process that holds the stage or its inputs is waited for; `on_wait` is called once.

    Args:
        name: the stage in dvc.yaml.
        job: writes the stage's outputs; called at most once, in this thread.
        force: run it even if nothing changed.
        pull: fetch missing results from the DVC remote before running.

    Raises:
        StageError: DVC refuses; or whatever `job` raises, unchanged, in which case dvc.lock is left alone.
    """
    call = _RecordedCall(job)
    _patch_dvc()
    token = _job.set(call)
    try:
        done = _retry_while_locked(lambda: _reproduce(name, call, force, pull), on_wait)
    except DvcException as error:
        if call.error is not None:
            raise call.error from call.error.__cause__
        raise StageError(f"{name}: {describe_error(error)}") from error
    except Exception as error:
        if call.error is not None or not pull:
            raise
        raise remote_error("read", error) from error
    finally:
        _job.reset(token)
    if call.called:
        return "executed"
    return "restored" if done else "unchanged"


class _RecordedCall:
    """A job that remembers whether it was called and what it raised."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.called = False
        self.error: Exception | None = None

    def __call__(self) -> None:
        self.called = True
        try:
            self.job()
        except Exception as error:
            self.error = error
            raise


def _reproduce(name: str, call: _RecordedCall, force: bool, pull: bool) -> list[Any]:
    repo = Repo(str(project_root()), _wait_for_lock=True)
    with repo:
        done = list(repo.reproduce([name], single_item=True, force=force, pull=pull))
        if done and not call.called and _drop_corrupt_cache(load_stage(repo, name)):
            done = list(repo.reproduce([name], single_item=True, pull=pull))
        return done


def _drop_corrupt_cache(stage: Any) -> bool:
    """Remove cached files that do not match their hash, and the outputs restored from them; True if there were any.

    DVC trusts a cached file that is write-protected. Half of one is left by a full disk, or by a copy that broke off.
    """
    broken = {path for out in stage.outs if out.use_cache for path in _cached(out) if _md5(path) != _expected_md5(path)}
    for path in broken:
        path.chmod(0o644)
        path.unlink()
    if broken:
        for out in stage.outs:
            out.remove()
    return bool(broken)


def _cached(out: Any) -> list[Path]:
    parts = [info for _, _, info in load(out.cache, out.hash_info)] if out.hash_info.isdir else []
    return [Path(out.cache.oid_to_path(info.value)) for info in (out.hash_info, *parts)]


def _expected_md5(path: Path) -> str:
    return (path.parent.name + path.name).removesuffix(".dir")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _retry_while_locked(attempt: Callable[[], list[Any]], on_wait: Callable[[str], None] | None) -> list[Any]:
    """Try again while another process works on the same files: DVC itself waits for its repository lock only."""
    notified = False
    while True:
        try:
            return attempt()
        except DvcException as error:
            blocked = next((part for part in error_chain(error) if isinstance(part, LockError)), None)
            if blocked is None:
                raise
            if on_wait and not notified:
                on_wait(str(blocked).partition("\n\n")[0])
            notified = True
            time.sleep(LOCK_POLL_SECONDS)


_original_cmd_run = getattr(dvc.stage.run, "cmd_run", None)


def _run_job(stage: Any, dry: bool = False, run_env: dict[str, str] | None = None) -> None:
    """Stands for `dvc.stage.run.cmd_run`: calls the job of this context if there is one, else spawns as DVC does."""
    job = _job.get()
    if job is None or dry:
        _original_cmd_run(stage, dry=dry, run_env=run_env)  # type: ignore[misc]
    else:
        job()


_original_modify_yaml = getattr(dvc.dvcfile, "modify_yaml", None)


@contextmanager
def _atomic_modify_yaml(path: str, fs: Any = None) -> Iterator[Any]:
    """Stands for `dvc.dvcfile.modify_yaml`, which a signal or a full disk could leave with half of dvc.lock written."""
    draft = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        if Path(path).exists():
            shutil.copy2(path, draft)
        with _original_modify_yaml(draft, fs=fs) as content:  # type: ignore[misc]
            yield content
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _patch_dvc() -> None:
    if _original_cmd_run is None or _original_modify_yaml is None:
        raise StageError("dvc.stage.run.cmd_run is gone in this version of DVC; install dvc>=3.67,<4 as pinned")
    dvc.stage.run.cmd_run = _run_job
    dvc.dvcfile.modify_yaml = _atomic_modify_yaml
    quiet_logger()
