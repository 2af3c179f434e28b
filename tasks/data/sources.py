"""Readers of row sources, by kind: `READERS[kind](source, seed)` returns rows and their origin.

A reader maps columns to the fields of the row type and keeps where each row came from. It does not judge rows: what
cannot even be parsed travels on as raw text with the reason, and stage prepare puts it into quarantine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.errors import DataError
from tasks.core.paths import state_dir
from tasks.core.rows import ROW_TYPES
from tasks.data.files import read_local
from tasks.data.film_reviews import TEXTS, read_film_reviews
from tasks.data.hub import read_hub, read_reasoning_gym
from tasks.data.pypi import fetch

if TYPE_CHECKING:
    from tasks.config.data import SourceParams

__all__ = ["READERS", "Reader", "SourceRows", "collect_source"]


@dataclass(frozen=True)
class SourceRows:
    """Rows of one source, and their origin.

    Attributes:
        rows: one envelope per row: {file, line, row: object}, or {file, line, raw, error} where a line is no row.
        origin: facts for the data card: where from, which version or commit, which checksum.
    """

    rows: list[dict[str, Any]]
    origin: dict[str, object] = field(default_factory=dict)


ReaderResult = tuple[Iterable[tuple[str, int, object]], dict[str, object]]
Reader = Callable[["SourceParams", int], ReaderResult]


def _film_reviews(source: SourceParams, seed: int) -> ReaderResult:
    sdist = fetch(source.id, form="sdist", sha256=source.sha256, cache=state_dir() / "downloads")
    rows = ((f"{sdist.name}/{Path(TEXTS).name}", line, row) for line, row in read_film_reviews(sdist))
    return rows, {"source": f"PyPI package {source.id} (sdist)", "file": sdist.name, "sha256": source.sha256}


READERS: Mapping[str, Reader] = {
    "film_reviews": _film_reviews,
    "hub": read_hub,
    "local": read_local,
    "reasoning_gym": read_reasoning_gym,
}


def collect_source(source: SourceParams, seed: int, readers: Mapping[str, Reader] = READERS) -> SourceRows:
    """Read one source, at most `limit` rows of it, in the source's order.

    Raises:
        SourceError: it cannot be reached, or is not what its checksum promises.
        DataError: it is empty, or lacks a column.
    """
    lines, origin = readers[source.kind](source, seed)
    rows: list[dict[str, Any]] = []
    for file, line, content in lines:
        if source.limit is not None and len(rows) >= source.limit:
            break
        rows.append(_wrap_row(source, file, line, content))
    if not rows:
        raise DataError(
            f"source {source.name!r} ({source.kind} {source.id}) holds no rows; check its id, subset and split"
        )
    return SourceRows(rows, origin)


def _wrap_row(source: SourceParams, file: str, line: int, content: object) -> dict[str, Any]:
    """Wrap a row with its file and line; a `str` is an unparsable line, as `reason`, newline, the line."""
    if isinstance(content, str):
        error, _, raw = content.partition("\n")
        return {"file": file, "line": line, "raw": raw, "error": error}
    if not isinstance(content, Mapping):
        raw = json.dumps(content, ensure_ascii=False, default=str)
        return {"file": file, "line": line, "raw": raw, "error": f"not an object but {type(content).__name__}"}
    row = _map_columns(source, content, line)
    if source.answer_pattern is None:
        return {"file": file, "line": line, "row": row}
    found = re.search(source.answer_pattern, str(row.get("answer", "")))
    if found is None:
        raw = json.dumps(content, ensure_ascii=False, default=str)
        return {"file": file, "line": line, "raw": raw, "error": f"answer: {source.answer_pattern!r} is not in it"}
    return {"file": file, "line": line, "row": row | {"answer": found[1].strip()}}


def _map_columns(source: SourceParams, content: Mapping[str, Any], line: int) -> dict[str, Any]:
    """Map a source's columns to the row type's fields; other columns are dropped."""
    fields = ROW_TYPES[source.row_type].model_fields
    row = {name: content[column] for name in fields if (column := source.columns.get(name, name)) in content}
    row["id"] = f"{source.name}-{row.get('id', line)}"
    if source.objective:
        row["objective"] = source.objective
    if source.row_type == "preferences" and "prompt" not in row:
        row |= _split_dialogue(row)
    if isinstance(row.get("prompt"), str) and row["prompt"]:
        row["prompt"] = source.template.replace("{prompt}", row["prompt"])
    if "ratings" in row:
        row["ratings"] = _ratings(row["ratings"])
    return row


def _ratings(value: Any) -> Any:
    """Parse ratings: a list, `[1, 2]` in a CSV cell, or one number."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return value
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


_ASSISTANT = "\n\nAssistant:"


def _split_dialogue(row: Mapping[str, Any]) -> dict[str, Any]:
    """Split two dialogues that differ in the assistant's last turn (Anthropic hh-rlhf) into prompt and answers.

    Sides of any other form share no prompt: the pair compares whole texts.
    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        return {"prompt": ""}
    cut = min(chosen.rfind(_ASSISTANT), rejected.rfind(_ASSISTANT)) + len(_ASSISTANT)
    if cut < len(_ASSISTANT) or chosen[:cut] != rejected[:cut]:
        return {"prompt": ""}
    return {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}
