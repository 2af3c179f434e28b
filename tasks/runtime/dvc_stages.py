"""Stages in DVC: order, keys, files, the reasons why one is not up to date, and running one.

`reproduce` is what `dvc repro --single-item` does, with two things replaced. Where DVC would start `python -m
tasks.sft` as a child, a function of ours is called in this process, so that torch and transformers are imported once.
And dvc.lock is written whole or not at all. Locks, the decision whether anything changed, the run-cache, removing and
hashing outputs, and the content of dvc.lock stay DVC's.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
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
from dvc.repo.reproduce import plan_repro
from dvc_data.hashfile import load

from tasks.config.params import differences
from tasks.core.errors import StageError
from tasks.core.paths import project_root
from tasks.runtime.dvc_repo import dvc_errors, error_chain, load_stage, open_repo, quiet_logger, remote_error

__all__ = [
    "Inputs", "Result", "StaleStage", "changes", "check_names", "graph", "inputs", "meta", "output_digests", "outputs",
    "reproduce", "stage_key", "stale_stages", "status", "why_stale",
]  # fmt: skip

Result = Literal["executed", "restored", "unchanged"]
Job = Callable[[], None]

LOCK_POLL_SECONDS = 1.0
MAX_HASH = 8  # characters of a file's md5
STATUS_TEXT = {
    "modified": "changed",
    "deleted": "is missing",
    "new": "is a new input",
    "not in cache": "is not in the cache",
}


@dataclass(frozen=True)
class Inputs:
    """Inputs of a stage that is about to run.

    `key` hashes all of it. `data` maps each file or folder that another stage wrote to its md5 (`….dir` for a folder).
    `code` are the Python files of `tasks/`, those in its folders included.
    """

    key: str
    data: dict[str, str] = field(default_factory=dict)
    code: tuple[Path, ...] = ()


@dataclass(frozen=True)
class StaleStage:
    """A stage that is not up to date: the reasons, and whether DVC's run-cache has its result already."""

    stage: str
    reasons: tuple[str, ...]
    in_run_cache: bool


def graph() -> dict[str, tuple[str, ...]]:
    """Every stage of dvc.yaml with those that it reads from, in an order of running; a StageError if it is invalid."""
    with dvc_errors("dvc.yaml"):
        return _order(open_repo().index.graph)


def check_names(stages: Sequence[str], known: Collection[str]) -> None:
    """Raise a StageError if one of these names is not among those that `graph` knows."""
    if unknown := [name for name in stages if name not in known]:
        raise StageError(f"no stage {unknown[0]!r} in dvc.yaml; its stages are {', '.join(known)}")


def stage_key(name: str) -> str | None:
    """The hash of everything the stage reads, as the run-cache has it; None while an input does not exist yet."""
    with dvc_errors(name):
        return _run_cache_key(load_stage(open_repo(), name))


def inputs(name: str) -> Inputs:
    """Inputs of a stage that is about to run, without a lock of DVC's; a StageError if one does not exist."""
    with dvc_errors(name):
        stage = load_stage(open_repo(), name)
        stage.save_deps()
        key = _run_cache_key(stage)
        if key is None:
            raise StageError(f"{name}: DVC cannot identify its inputs; run `dvc status {name}`")
        files = [dep for dep in stage.deps if not isinstance(dep, ParamsDependency)]
        produced = [out.fs_path for other in stage.repo.index.stages for out in other.outs]
        written = [dep for dep in files if any(dep.fs.isin_or_eq(dep.fs_path, out) for out in produced)]
        data = {str(dep): dep.hash_info.value for dep in written}
        ours = [path for dep in files if (path := Path(dep.fs_path)).is_relative_to(project_root() / "tasks")]
        code = [found for path in ours for found in (path.rglob("*.py") if path.is_dir() else [path])]
        return Inputs(key, data, tuple(path for path in code if path.suffix == ".py"))


def outputs(name: str) -> list[Path]:
    """Output paths of the stage: files and folders, metrics included."""
    with dvc_errors(name):
        return [Path(out.fs_path) for out in load_stage(open_repo(), name).outs]


def output_digests(name: str) -> dict[str, str]:
    """The md5 of each output of the stage as it lies in the workspace (`….dir` for a folder); takes no lock."""
    with dvc_errors(name):
        return {str(out): out.get_hash().value for out in load_stage(open_repo(), name).outs if out.exists}


def meta(name: str) -> dict[str, bool]:
    """The stage's `meta` in dvc.yaml, which is not in its key.

    `device`: it computes on the accelerator. `ranks`: several processes can share its work.
    """
    with dvc_errors(name):
        return load_stage(open_repo(), name).meta or {}


def changes(name: str) -> list[str]:
    """Inputs of the stage that changed since it last ran, one reason a line; takes no lock."""
    with dvc_errors(name):
        return _changed_inputs(load_stage(open_repo(), name))


def status(name: str) -> list[str]:
    """Reasons why the stage would not be skipped, one a line; empty if it is up to date by itself."""
    with dvc_errors(name):
        return why_stale(load_stage(open_repo(), name))


def stale_stages() -> list[StaleStage]:
    """The stages that are not up to date, in order; a stage after one that has to run is among them."""
    with dvc_errors("dvc.yaml"):
        index = open_repo().index  # one reading of dvc.lock for all stages
        stages = {stage.addressing: stage for stage in index.stages}
        waiting: dict[str, StaleStage] = {}
        for name, needs in _order(index.graph).items():
            stage = stages[name]
            why = why_stale(stage) + [f"reads what {need} will write" for need in needs if need in waiting]
            uncertain = [need for need in needs if need in waiting and not waiting[need].in_run_cache]
            if why:
                waiting[name] = StaleStage(name, tuple(why), not uncertain and _in_run_cache(stage))
        return list(waiting.values())


def _run_cache_key(stage: Any) -> str | None:
    stage_cache: Any = dvc.stage.cache
    try:
        can_hash, get_hash = stage_cache._can_hash, stage_cache._get_stage_hash
    except AttributeError as error:
        raise StageError("the stage hash moved in this version of DVC; install dvc>=3.67,<4 as pinned") from error
    if not all(dep.exists for dep in stage.deps):
        return None
    stage.save_deps()
    return str(get_hash(stage)) if can_hash(stage) else None


def why_stale(stage: Any) -> list[str]:
    """See `status`; for a stage as DVC has loaded it."""
    why = _changed_inputs(stage)
    if _never_ran(stage):
        return why
    for out in stage.outs:
        why += [f"its output {path} {STATUS_TEXT.get(state, state)}" for path, state in out.status().items()]
    return why


def _changed_inputs(stage: Any) -> list[str]:
    if _never_ran(stage):
        return ["it has no entry in dvc.lock: it never ran here"]
    why = ["its command changed"] if stage.changed_stage() else []
    for dep in stage.deps:
        why += _changed_params(dep) if isinstance(dep, ParamsDependency) else _changed_file(dep)
    return why


def _order(edges: Any) -> dict[str, tuple[str, ...]]:
    """Every stage with those that it reads from, in the order of `dvc repro`: so dvc.lock is the same, line by line."""
    stages = {
        stage.addressing: tuple(need.addressing for need in edges.successors(stage) if not need.is_data_source)
        for stage in plan_repro(edges)
        if not stage.is_data_source
    }
    if not stages:
        raise StageError(f"{project_root() / 'dvc.yaml'} has no stage: `git checkout dvc.yaml`")
    return stages


def _in_run_cache(stage: Any) -> bool:
    if _run_cache_key(stage) is None:
        return False
    entry = stage.repo.stage_cache._load(stage)
    return bool(entry) and bool(stage.repo.stage_cache._create_stage(entry, wdir=stage.wdir).outs_cached())


def _never_ran(stage: Any) -> bool:
    return not any(dep.hash_info for dep in stage.deps)


def _changed_file(dep: Any) -> list[str]:
    if not dep.hash_info:
        return [f"{dep} is a new input"]
    return [
        f"{path} changed: {dep.hash_info.value[:MAX_HASH]} → {dep.get_hash().value[:MAX_HASH]}"
        if state == "modified"
        else f"{path} {STATUS_TEXT.get(state, state)}"
        for path, state in dep.workspace_status().items()
    ]


def _changed_params(dep: Any) -> list[str]:
    before, now = dep.hash_info.value or {}, dep.read_params()
    why: list[str] = []
    for section in dep.params:
        if section not in before:
            why.append(f"{section} is a new parameter")
        else:
            why += differences({section: before[section]}, {section: now.get(section)})
    return why


# -- running a stage -------------------------------------------------------------------------------------------

_job: ContextVar[Job | None] = ContextVar("job", default=None)


def reproduce(
    name: str, job: Job, *, force: bool = False, pull: bool = False, on_wait: Callable[[str], None] | None = None
) -> Result:
    """Bring one stage up to date by calling `job`, unless DVC finds that it is, or restores it from its run-cache.

    Another process that holds the stage or its inputs is waited for. A StageError if DVC refuses. What `job` raises
    comes unchanged, and leaves dvc.lock alone.

    Args:
        job: writes the stage's outputs; called at most once, in this thread.
        on_wait: called once, before a wait.
    """
    _patch_dvc()
    call = _RecordedCall(job)
    token = _job.set(call)
    try:
        done = _retry_while_locked(lambda: _reproduce(name, call, force, pull), on_wait)
    except DvcException:
        if call.error is not None:
            raise call.error from call.error.__cause__
        with dvc_errors(name):
            raise
    except Exception as error:
        if call.error is not None or not pull:
            raise
        raise remote_error("read", error) from error
    finally:
        _job.reset(token)
    if call.called:
        return "executed"
    return "restored" if done else "unchanged"


@dataclass
class _RecordedCall:
    """A job that remembers whether it was called and what it raised."""

    job: Job
    called: bool = False
    error: Exception | None = None

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
    broken = {path for out in stage.outs if out.use_cache for path in _cached(out) if _is_corrupt(path)}
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


def _is_corrupt(path: Path) -> bool:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    return found != (path.parent.name + path.name).removesuffix(".dir")


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
_original_modify_yaml = getattr(dvc.dvcfile, "modify_yaml", None)


def _run_job(stage: Any, dry: bool = False, run_env: dict[str, str] | None = None) -> None:
    """Stands for `dvc.stage.run.cmd_run`: calls the job of this context, if there is one."""
    job = _job.get()
    if job is None or dry:
        _original_cmd_run(stage, dry=dry, run_env=run_env)  # type: ignore[misc]
    else:
        job()


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
