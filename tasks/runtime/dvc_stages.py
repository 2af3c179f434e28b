"""Stages in DVC: their order, keys and files, and the reasons why one is not up to date.

Running a stage is in `tasks.runtime.dvc_reproduce`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import dvc.stage.cache
from dvc.dependency.param import ParamsDependency

from tasks.core.errors import StageError
from tasks.core.paths import project_root
from tasks.runtime.dvc_repo import dvc_errors, load_stage, open_repo

__all__ = [
    "Inputs",
    "StaleStage",
    "changes",
    "graph",
    "inputs",
    "is_distributable",
    "needs_device",
    "output_digests",
    "outputs",
    "stage_key",
    "stale_stages",
    "status",
    "why_stale",
]

MAX_VALUE, MAX_HASH = 60, 8  # characters of a value, and of a file's md5
STATUS_TEXT = {
    "modified": "changed",
    "deleted": "is missing",
    "new": "is a new input",
    "not in cache": "is not in the cache",
}


@dataclass(frozen=True)
class Inputs:
    """Inputs of a stage that is about to run.

    `key` hashes all of it, parameters and command included; `data` maps each file or folder that another stage wrote
    to its md5 (`….dir` for a folder); `code` are the Python files of `tasks/`, those in its folders included.
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
    """Every stage of dvc.yaml with the stages whose outputs it reads, in an order in which they can run.

    Raises:
        StageError: dvc.yaml is not valid, or there is no DVC project.
    """
    with dvc_errors("dvc.yaml"):
        return _order(open_repo().index.graph)


def stage_key(name: str) -> str | None:
    """The hash of everything the stage reads, as the run-cache has it; None while an input does not exist yet."""
    with dvc_errors(name):
        return _run_cache_key(load_stage(open_repo(), name))


def inputs(name: str) -> Inputs:
    """Key and data of a stage that is about to run; takes no lock of DVC, so a child of `dvc repro` may call it.

    Raises:
        StageError: an input does not exist.
    """
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


def needs_device(name: str) -> bool:
    """Whether the stage computes on the accelerator: `meta: {device: true}` in dvc.yaml, not in its key."""
    return _meta(name, "device")


def is_distributable(name: str) -> bool:
    """Whether several processes can share the stage's work: `meta: {ranks: true}` in dvc.yaml, not in its key."""
    return _meta(name, "ranks")


def changes(name: str) -> list[str]:
    """What the stage reads that is not as it was when it ran last, one reason a line; takes no lock."""
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
    """The hash of everything that a loaded stage reads, as the run-cache has it; None while an input does not exist."""
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
    """Why the stage, as DVC has loaded it, is not up to date, one reason a line; empty if it is."""
    why = _changed_inputs(stage)
    if _never_ran(stage):
        return why
    for out in stage.outs:
        why += [f"its output {path} {STATUS_TEXT.get(state, state)}" for path, state in out.status().items()]
    return why


def _changed_inputs(stage: Any) -> list[str]:
    """What the stage reads that is not as it was when it ran last, one reason a line."""
    if _never_ran(stage):
        return ["it has no entry in dvc.lock: it never ran here"]
    why = ["its command changed"] if stage.changed_stage() else []
    for dep in stage.deps:
        why += _changed_params(dep) if isinstance(dep, ParamsDependency) else _changed_file(dep)
    return why


def _order(edges: Any) -> dict[str, tuple[str, ...]]:
    needs = {
        stage.addressing: tuple(need.addressing for need in edges.successors(stage) if not need.is_data_source)
        for stage in edges
        if not stage.is_data_source
    }
    return {name: needs[name] for name in TopologicalSorter(needs).static_order()}


def _meta(name: str, key: str) -> bool:
    with dvc_errors(name):
        return bool((load_stage(open_repo(), name).meta or {}).get(key))


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
            why += _diff_values(section, before[section], now.get(section))
    return why


def _diff_values(key: str, before: Any, now: Any) -> list[str]:
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*before, *(name for name in now if name not in before)]
        return [line for name in names for line in _diff_values(f"{key}.{name}", before.get(name), now.get(name))]
    return [] if before == now else [f"{key}: {_shorten(before)} → {_shorten(now)}"]


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 1]}…"
