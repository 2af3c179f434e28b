"""Why a stage is not up to date, in words: what differs between dvc.lock and what lies there, from what to what."""

from __future__ import annotations

from typing import Any

from dvc.dependency.param import ParamsDependency

__all__ = ["changed_inputs", "why_stale"]

_SHOWN, _SHOWN_HASH = 60, 8  # characters of a value, and of a file's md5
STATUS_TEXT = {
    "modified": "changed",
    "deleted": "is missing",
    "new": "is a new input",
    "not in cache": "is not in the cache",
}


def why_stale(stage: Any) -> list[str]:
    """Why the stage, as DVC has loaded it, is not up to date, one reason a line; empty if it is."""
    why = changed_inputs(stage)
    if _never_ran(stage):
        return why
    for out in stage.outs:
        why += [f"its output {path} {STATUS_TEXT.get(state, state)}" for path, state in out.status().items()]
    return why


def changed_inputs(stage: Any) -> list[str]:
    """What the stage reads that is not as it was when it ran last, one reason a line."""
    if _never_ran(stage):
        return ["it has no entry in dvc.lock: it never ran here"]
    why = ["its command changed"] if stage.changed_stage() else []
    for dep in stage.deps:
        why += _changed_params(dep) if isinstance(dep, ParamsDependency) else _changed_file(dep)
    return why


def _never_ran(stage: Any) -> bool:
    return not any(dep.hash_info for dep in stage.deps)


def _changed_file(dep: Any) -> list[str]:
    if not dep.hash_info:
        return [f"{dep} is a new input"]
    return [
        f"{path} changed: {dep.hash_info.value[:_SHOWN_HASH]} → {dep.get_hash().value[:_SHOWN_HASH]}"
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
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
