"""The only door to DVC: the graph of stages, their keys, what changed, and running one of them.

`reproduce` is what `dvc repro --single-item` does, with two things replaced. Where DVC would start `python -m
tasks.sft` as a child, a function of ours is called in this process, so that torch and transformers are imported once.
And dvc.lock is written whole or not at all. Locks, the decision whether anything changed, the run-cache, removing and
hashing outputs, and the content of dvc.lock stay DVC's.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import dvc.dvcfile
import dvc.stage.cache
import dvc.stage.run
from dvc.dependency.param import ParamsDependency
from dvc.exceptions import DvcException
from dvc.lock import LockError
from dvc.repo import Repo
from dvc.stage.exceptions import StageNotFound
from dvc_data.hashfile import load
from dvc_data.hashfile.checkout import checkout
from dvc_data.hashfile.hash_info import HashInfo
from dvc_objects.errors import ObjectFormatError
from dvc_objects.fs import localfs

from tasks.core.errors import StageError
from tasks.core.paths import project_root
from tasks.core.reasons import changed_inputs, reasons

__all__ = [
    "Inputs",
    "Pending",
    "Result",
    "changes",
    "check_remote",
    "data_version",
    "graph",
    "inputs",
    "needs_device",
    "output_digests",
    "outputs",
    "pending",
    "pull_data",
    "push",
    "reproduce",
    "restore",
    "separate_cache",
    "share_cache",
    "stage_key",
    "status",
    "takes_ranks",
]

Result = Literal["executed", "restored", "unchanged"]
Job = Callable[[], None]

DATA = "data"
"""The folder of what users bring along; what else enters the pipeline is named in params.yaml."""

LOCK_POLL_SECONDS = 1.0
_FULL = 2**20  # free bytes below which a disk counts as full: DVC's own message may blame something else

_job: ContextVar[Job | None] = ContextVar("job", default=None)


@dataclass(frozen=True)
class Inputs:
    """What a stage is about to read.

    `key` hashes all of it, parameters and command included; `data` maps each file or folder that another stage wrote
    to its md5 (`….dir` for a folder); `code` are the Python files.
    """

    key: str
    data: dict[str, str] = field(default_factory=dict)
    code: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Pending:
    """Why a stage is not up to date. `recorded`: DVC's run-cache knows the result, so it will not be computed again."""

    stage: str
    reasons: tuple[str, ...]
    recorded: bool


def graph() -> dict[str, tuple[str, ...]]:
    """Every stage of dvc.yaml with the stages whose outputs it reads, in an order in which they can run.

    Raises:
        StageError: dvc.yaml is not valid, or there is no DVC project.
    """
    with _dvc_errors("dvc.yaml"):
        return _ordered(_open().index.graph)


def _ordered(edges: Any) -> dict[str, tuple[str, ...]]:
    waiting = {
        stage.addressing: tuple(need.addressing for need in edges.successors(stage) if not need.is_data_source)
        for stage in edges
        if not stage.is_data_source
    }
    ordered: dict[str, tuple[str, ...]] = {}
    while waiting:  # DVC has made sure that there is no cycle
        name = next(name for name, needs in waiting.items() if all(need in ordered for need in needs))
        ordered[name] = waiting.pop(name)
    return ordered


def stage_key(name: str) -> str | None:
    """The hash of everything the stage reads, as the run-cache has it; None while an input does not exist yet."""
    with _dvc_errors(name):
        return _key(_stage(_open(), name))


def inputs(name: str) -> Inputs:
    """Key and data of a stage that is about to run; takes no lock of DVC, so a child of `dvc repro` may call it.

    Raises:
        StageError: an input does not exist.
    """
    with _dvc_errors(name):
        stage = _stage(_open(), name)
        stage.save_deps()
        key = _key(stage)
        if key is None:
            raise StageError(f"{name}: DVC cannot identify its inputs; run `dvc status {name}`")
        files = [dep for dep in stage.deps if not isinstance(dep, ParamsDependency)]
        made = [out.fs_path for other in stage.repo.index.stages for out in other.outs]
        written = [dep for dep in files if any(dep.fs.isin_or_eq(dep.fs_path, out) for out in made)]
        data = {str(dep): dep.hash_info.value for dep in written}
        return Inputs(key, data, tuple(Path(dep.fs_path) for dep in files if dep.fs_path.endswith(".py")))


def data_version() -> str | None:
    """The md5 of the folder `data`, as DVC hashes it; None where no stage reads one."""
    with _dvc_errors("data"):
        deps = (dep for stage in _open().index.stages for dep in stage.deps if str(dep) == DATA)
        dep = next(deps, None)
        return str(dep.get_hash().value) if dep and dep.exists else None


def needs_device(name: str) -> bool:
    """Whether the stage computes on the accelerator: `meta: {device: true}` in dvc.yaml, not in its key."""
    return _meta(name, "device")


def takes_ranks(name: str) -> bool:
    """Whether several processes can share the stage's work: `meta: {ranks: true}` in dvc.yaml, not in its key."""
    return _meta(name, "ranks")


def outputs(name: str) -> list[Path]:
    """Where the stage writes: files and folders, metrics included."""
    with _dvc_errors(name):
        return [Path(out.fs_path) for out in _stage(_open(), name).outs]


def output_digests(name: str) -> dict[str, str]:
    """The md5 of each output of the stage as it lies in the workspace (`….dir` for a folder); takes no lock."""
    with _dvc_errors(name):
        return {str(out): out.get_hash().value for out in _stage(_open(), name).outs if out.exists}


def changes(name: str) -> list[str]:
    """What the stage reads that is not as it was when it ran last, one reason a line; takes no lock."""
    with _dvc_errors(name):
        return changed_inputs(_stage(_open(), name))


def status(name: str) -> list[str]:
    """Why the stage would not be skipped, one reason a line; empty if it is up to date by itself."""
    with _dvc_errors(name):
        return reasons(_stage(_open(), name))


def pending() -> list[Pending]:
    """The stages that are not up to date, in order; a stage after one that has to run is among them."""
    with _dvc_errors("dvc.yaml"):
        index = _open().index  # one reading of dvc.lock for all stages
        stages = {stage.addressing: stage for stage in index.stages}
        waiting: dict[str, Pending] = {}
        for name, needs in _ordered(index.graph).items():
            stage = stages[name]
            why = reasons(stage) + [f"reads what {need} will write" for need in needs if need in waiting]
            uncertain = [need for need in needs if need in waiting and not waiting[need].recorded]
            if why:
                waiting[name] = Pending(name, tuple(why), not uncertain and _recorded(stage))
        return list(waiting.values())


def reproduce(
    name: str, job: Job, *, force: bool = False, pull: bool = False, on_wait: Callable[[str], None] | None = None
) -> Result:
    """Bring one stage up to date by calling `job`, unless DVC finds that it is, or restores it from its run-cache.

    Another process that holds the stage or its inputs is waited for; `on_wait` is told once.

    Args:
        name: the stage in dvc.yaml.
        job: writes the stage's outputs; called at most once, in this thread.
        force: run it even if nothing changed.
        pull: fetch missing results from the DVC remote before running.

    Raises:
        StageError: DVC refuses; or whatever `job` raises, unchanged, in which case dvc.lock is left alone.
    """
    call = _Call(job)
    _replace_runner()
    token = _job.set(call)
    try:
        done = _when_free(lambda: _reproduce(name, call, force, pull), on_wait)
    except DvcException as error:
        if call.error is not None:
            raise call.error from call.error.__cause__
        raise StageError(f"{name}: {_cause(error)}") from error
    except Exception as error:
        if call.error is not None or not pull:
            raise
        raise _remote_error("read", error) from error
    finally:
        _job.reset(token)
    if call.called:
        return "executed"
    return "restored" if done else "unchanged"


def check_remote() -> None:
    """Make sure that there is a DVC remote, before a stage's own attempt to fetch from one is only a warning.

    Raises:
        StageError: there is none.
    """
    with _dvc_errors("--pull"):
        _open().cloud.get_remote(command="pull")


def pull_data() -> None:
    """Fetch the data that `dvc add` tracks and that is not here, from the cache or the DVC remote.

    Raises:
        StageError: there is no remote, it does not answer, or it does not have the data.
    """
    with _dvc_errors("data"):
        repo = _open()
        sources = [stage for stage in repo.index.stages if stage.is_data_source]
        if missing := [stage.addressing for stage in sources if not all(out.exists for out in stage.outs)]:
            with _remote_errors("read"):
                repo.pull(targets=missing)


def push(name: str | None = None) -> int:
    """Send a stage's outputs, or everything's, and the run-cache to the DVC remote; how many files went.

    Raises:
        StageError: there is no remote, or it does not answer.
    """
    with _dvc_errors(name or "push"), _remote_errors("written"):
        return int(_open().push(targets=[name] if name else None, run_cache=True))


def restore(md5: str, path: Path) -> None:
    """Write the file or folder that has this md5 (`….dir` for a folder), from the cache or the DVC remote.

    Raises:
        StageError: neither has it.
    """
    with _dvc_errors(str(path)):
        repo = _open()
        cache, wanted = repo.cache.local, HashInfo("md5", md5)
        try:
            found = load(cache, wanted)
            parts = [info.value for _, _, info in found] if wanted.isdir else [md5]
            if not all(cache.exists(part) for part in parts):
                raise FileNotFoundError(md5)
        except (FileNotFoundError, ObjectFormatError):
            try:
                repo.cloud.pull([wanted])
                found = load(cache, wanted)
            except Exception as error:
                raise StageError(f"neither the DVC cache nor a DVC remote has {md5}, wanted for {path}") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        checkout(str(path), localfs, found, cache, force=True, quiet=True)


def share_cache(folder: Path) -> None:
    """Let another working copy of this project use this one's cache."""
    with _dvc_errors(str(folder)):
        cache = str(_open().cache.local_cache_dir)
        with Repo(str(folder)).config.edit("local") as config:
            config["cache"]["dir"] = cache


def separate_cache(folder: Path) -> None:
    """Give another working copy of this project a cache of its own, whatever its settings say."""
    with _dvc_errors(str(folder)), Repo(str(folder)).config.edit("local") as config:
        config["cache"]["dir"] = str(folder / ".dvc" / "cache")


class _Call:
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


def _reproduce(name: str, call: _Call, force: bool, pull: bool) -> list[Any]:
    repo = Repo(str(project_root()), _wait_for_lock=True)
    with repo:
        done = list(repo.reproduce([name], single_item=True, force=force, pull=pull))
        if done and not call.called and _remove_broken(_stage(repo, name)):
            done = list(repo.reproduce([name], single_item=True, pull=pull))
        return done


def _remove_broken(stage: Any) -> bool:
    """Whether what was restored came from cached files that are not what their names say; they and it are gone then.

    DVC trusts a cached file that is write-protected. Half of one is left by a full disk, or by a copy that broke off.
    """
    broken = {path for out in stage.outs if out.use_cache for path in _cached(out) if _md5(path) != _name(path)}
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


def _name(path: Path) -> str:
    return (path.parent.name + path.name).removesuffix(".dir")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _when_free(attempt: Callable[[], list[Any]], on_wait: Callable[[str], None] | None) -> list[Any]:
    """Try again while another process works on the same files: DVC itself waits for its repository lock only."""
    told = False
    while True:
        try:
            return attempt()
        except DvcException as error:
            blocked = next((part for part in _causes(error) if isinstance(part, LockError)), None)
            if blocked is None:
                raise
            if on_wait and not told:
                on_wait(str(blocked).partition("\n\n")[0])
            told = True
            time.sleep(LOCK_POLL_SECONDS)


_spawn = getattr(dvc.stage.run, "cmd_run", None)


def _run_job(stage: Any, dry: bool = False, run_env: dict[str, str] | None = None) -> None:
    """Stands for `dvc.stage.run.cmd_run`: calls the job of this context if there is one, else spawns as DVC does."""
    job = _job.get()
    if job is None or dry:
        _spawn(stage, dry=dry, run_env=run_env)  # type: ignore[misc]
    else:
        job()


_modify = getattr(dvc.dvcfile, "modify_yaml", None)


@contextmanager
def _modify_whole(path: str, fs: Any = None) -> Iterator[Any]:
    """Stands for `dvc.dvcfile.modify_yaml`, which a signal or a full disk could leave with half of dvc.lock written."""
    draft = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        if Path(path).exists():
            shutil.copy2(path, draft)
        with _modify(draft, fs=fs) as content:  # type: ignore[misc]
            yield content
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _replace_runner() -> None:
    if _spawn is None or _modify is None:
        raise StageError("dvc.stage.run.cmd_run is gone in this version of DVC; install dvc>=3.67,<4 as pinned")
    dvc.stage.run.cmd_run = _run_job
    dvc.dvcfile.modify_yaml = _modify_whole
    _quiet_logger()


def _open() -> Repo:
    _quiet_logger()
    return Repo(str(project_root()))


def _quiet_logger() -> None:
    # DVC installs its own handlers when imported: what also reached the root logger would be printed twice, and what it
    # tells a person at its own command line (INFO) is not for ours.
    for name in ("dvc", "dvc_data", "dvc_objects"):
        logging.getLogger(name).propagate = False
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("dvc.output").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """An output may well be empty: no row was malformed, or the stage is off."""
    return not record.getMessage().endswith("is empty.")


def _stage(repo: Any, name: str) -> Any:
    try:
        return repo.stage.load_one(str(project_root() / "dvc.yaml"), name)
    except StageNotFound as error:
        known = ", ".join(stage.addressing for stage in repo.index.stages)
        raise StageError(f"dvc.yaml has no stage {name!r}; its stages are {known}") from error


def _key(stage: Any) -> str | None:
    private: Any = dvc.stage.cache
    try:
        can_hash, get_hash = private._can_hash, private._get_stage_hash
    except AttributeError as error:
        raise StageError("the stage hash moved in this version of DVC; install dvc>=3.67,<4 as pinned") from error
    if not all(dep.exists for dep in stage.deps):
        return None
    stage.save_deps()
    return str(get_hash(stage)) if can_hash(stage) else None


def _recorded(stage: Any) -> bool:
    if _key(stage) is None:
        return False
    entry = stage.repo.stage_cache._load(stage)
    return bool(entry) and bool(stage.repo.stage_cache._create_stage(entry, wdir=stage.wdir).outs_cached())


def _meta(name: str, key: str) -> bool:
    with _dvc_errors(name):
        return bool((_stage(_open(), name).meta or {}).get(key))


@contextmanager
def _dvc_errors(where: str) -> Iterator[None]:
    try:
        yield
    except DvcException as error:
        raise StageError(f"{where}: {_cause(error)}") from error


@contextmanager
def _remote_errors(what: str) -> Iterator[None]:
    try:
        yield
    except (DvcException, StageError):
        raise
    except Exception as error:
        raise _remote_error(what, error) from error


def _remote_error(what: str, error: Exception) -> StageError:
    """For whatever the remote's own library raises."""
    missing = re.search("requires '(dvc-[a-z0-9]+)'", str(error))
    cure = f"; pip install -c requirements.lock {missing[1]}" if missing else ""
    return StageError(f"the DVC remote cannot be {what}: {type(error).__name__}: {error}{cure}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__


def _cause(error: BaseException) -> str:
    last = list(_causes(error))[-1]
    full = isinstance(last, OSError) and last.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or shutil.disk_usage(project_root()).free < _FULL:
        return "no space left on the disk for its outputs, so none were recorded: free some, then run again"
    if isinstance(last, FileNotFoundError) and last.filename:
        return f"{last.filename} does not exist; if the DVC remote has it, `rlhf run --pull` fetches it"
    return str(last)
