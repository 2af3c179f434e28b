"""What DVC knows: the graph of stages, their keys and files, what changed, and the data in its cache and remote.

Running a stage is in `tasks.runtime.dvc_reproduce`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvc.dependency.param import ParamsDependency
from dvc.repo import Repo
from dvc_data.hashfile import load
from dvc_data.hashfile.checkout import checkout
from dvc_data.hashfile.hash_info import HashInfo
from dvc_objects.errors import ObjectFormatError
from dvc_objects.fs import localfs

from tasks.core.errors import StageError
from tasks.runtime.dvc_project import dvc_errors, load_stage, open_repo, remote_errors, run_cache_key
from tasks.runtime.reasons import changed_inputs, why_stale

__all__ = [
    "Inputs",
    "StaleStage",
    "changes",
    "check_remote",
    "data_md5",
    "graph",
    "inputs",
    "is_distributable",
    "needs_device",
    "output_digests",
    "outputs",
    "pull_data",
    "push",
    "restore",
    "stage_key",
    "stale_stages",
    "status",
    "use_own_cache",
    "use_shared_cache",
]

DATA = "data"
"""The folder of what users bring along; what else enters the pipeline is named in params.yaml."""


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
class StaleStage:
    """Why a stage is not up to date. `recorded`: DVC's run-cache knows the result, so it will not be computed again."""

    stage: str
    reasons: tuple[str, ...]
    recorded: bool


def graph() -> dict[str, tuple[str, ...]]:
    """Every stage of dvc.yaml with the stages whose outputs it reads, in an order in which they can run.

    Raises:
        StageError: dvc.yaml is not valid, or there is no DVC project.
    """
    with dvc_errors("dvc.yaml"):
        return _ordered(open_repo().index.graph)


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
    with dvc_errors(name):
        return run_cache_key(load_stage(open_repo(), name))


def inputs(name: str) -> Inputs:
    """Key and data of a stage that is about to run; takes no lock of DVC, so a child of `dvc repro` may call it.

    Raises:
        StageError: an input does not exist.
    """
    with dvc_errors(name):
        stage = load_stage(open_repo(), name)
        stage.save_deps()
        key = run_cache_key(stage)
        if key is None:
            raise StageError(f"{name}: DVC cannot identify its inputs; run `dvc status {name}`")
        files = [dep for dep in stage.deps if not isinstance(dep, ParamsDependency)]
        produced = [out.fs_path for other in stage.repo.index.stages for out in other.outs]
        written = [dep for dep in files if any(dep.fs.isin_or_eq(dep.fs_path, out) for out in produced)]
        data = {str(dep): dep.hash_info.value for dep in written}
        return Inputs(key, data, tuple(Path(dep.fs_path) for dep in files if dep.fs_path.endswith(".py")))


def data_md5() -> str | None:
    """The md5 of the folder `data`, as DVC hashes it; None where no stage reads one."""
    with dvc_errors("data"):
        deps = (dep for stage in open_repo().index.stages for dep in stage.deps if str(dep) == DATA)
        dep = next(deps, None)
        return str(dep.get_hash().value) if dep and dep.exists else None


def needs_device(name: str) -> bool:
    """Whether the stage computes on the accelerator: `meta: {device: true}` in dvc.yaml, not in its key."""
    return _meta(name, "device")


def is_distributable(name: str) -> bool:
    """Whether several processes can share the stage's work: `meta: {ranks: true}` in dvc.yaml, not in its key."""
    return _meta(name, "ranks")


def outputs(name: str) -> list[Path]:
    """Where the stage writes: files and folders, metrics included."""
    with dvc_errors(name):
        return [Path(out.fs_path) for out in load_stage(open_repo(), name).outs]


def output_digests(name: str) -> dict[str, str]:
    """The md5 of each output of the stage as it lies in the workspace (`….dir` for a folder); takes no lock."""
    with dvc_errors(name):
        return {str(out): out.get_hash().value for out in load_stage(open_repo(), name).outs if out.exists}


def changes(name: str) -> list[str]:
    """What the stage reads that is not as it was when it ran last, one reason a line; takes no lock."""
    with dvc_errors(name):
        return changed_inputs(load_stage(open_repo(), name))


def status(name: str) -> list[str]:
    """Why the stage would not be skipped, one reason a line; empty if it is up to date by itself."""
    with dvc_errors(name):
        return why_stale(load_stage(open_repo(), name))


def stale_stages() -> list[StaleStage]:
    """The stages that are not up to date, in order; a stage after one that has to run is among them."""
    with dvc_errors("dvc.yaml"):
        index = open_repo().index  # one reading of dvc.lock for all stages
        stages = {stage.addressing: stage for stage in index.stages}
        waiting: dict[str, StaleStage] = {}
        for name, needs in _ordered(index.graph).items():
            stage = stages[name]
            why = why_stale(stage) + [f"reads what {need} will write" for need in needs if need in waiting]
            uncertain = [need for need in needs if need in waiting and not waiting[need].recorded]
            if why:
                waiting[name] = StaleStage(name, tuple(why), not uncertain and _in_run_cache(stage))
        return list(waiting.values())


def check_remote() -> None:
    """Make sure that there is a DVC remote, before a stage's own attempt to fetch from one is only a warning.

    Raises:
        StageError: there is none.
    """
    with dvc_errors("--pull"):
        open_repo().cloud.get_remote(command="pull")


def pull_data() -> None:
    """Fetch the data that `dvc add` tracks and that is not here, from the cache or the DVC remote.

    Raises:
        StageError: there is no remote, it does not answer, or it does not have the data.
    """
    with dvc_errors("data"):
        repo = open_repo()
        sources = [stage for stage in repo.index.stages if stage.is_data_source]
        if missing := [stage.addressing for stage in sources if not all(out.exists for out in stage.outs)]:
            with remote_errors("read"):
                repo.pull(targets=missing)


def push(name: str | None = None) -> int:
    """Send a stage's outputs, or everything's, and the run-cache to the DVC remote; how many files went.

    Raises:
        StageError: there is no remote, or it does not answer.
    """
    with dvc_errors(name or "push"), remote_errors("written"):
        return int(open_repo().push(targets=[name] if name else None, run_cache=True))


def restore(md5: str, path: Path) -> None:
    """Write the file or folder that has this md5 (`….dir` for a folder), from the cache or the DVC remote.

    Raises:
        StageError: neither has it.
    """
    with dvc_errors(str(path)):
        repo = open_repo()
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


def use_shared_cache(folder: Path) -> None:
    """Let another working copy of this project use this one's cache."""
    with dvc_errors(str(folder)):
        cache = str(open_repo().cache.local_cache_dir)
        with Repo(str(folder)).config.edit("local") as config:
            config["cache"]["dir"] = cache


def use_own_cache(folder: Path) -> None:
    """Give another working copy of this project a cache of its own, whatever its settings say."""
    with dvc_errors(str(folder)), Repo(str(folder)).config.edit("local") as config:
        config["cache"]["dir"] = str(folder / ".dvc" / "cache")


def _in_run_cache(stage: Any) -> bool:
    if run_cache_key(stage) is None:
        return False
    entry = stage.repo.stage_cache._load(stage)
    return bool(entry) and bool(stage.repo.stage_cache._create_stage(entry, wdir=stage.wdir).outs_cached())


def _meta(name: str, key: str) -> bool:
    with dvc_errors(name):
        return bool((load_stage(open_repo(), name).meta or {}).get(key))
