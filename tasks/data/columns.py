"""From a source's own columns to the fields of its row type."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from tasks.core.errors import DataError
from tasks.core.rows import ROW_TYPES

if TYPE_CHECKING:
    from tasks.config.data import SourceParams

__all__ = ["check_columns", "map_columns", "number_rows"]

_SHOWN_COLUMNS = 40
_LABELS = ("id", "group", "answer")
_LISTS = ("ratings", "labelled_by", "guidelines")


def check_columns(source: SourceParams, columns: Sequence[str]) -> None:
    """Check that some row has each column that the row type needs, or that the source's mapping names.

    Raises:
        DataError: with the columns there are, and the mapping to write.
    """
    fields = ROW_TYPES[source.row_type].model_fields.items()
    required = [name for name, field in fields if field.is_required() and name != "id"]  # rows can be numbered
    wanted = {name: source.columns.get(name, name) for name in (*required, *source.columns)}
    missing = [name for name, column in wanted.items() if column not in columns]
    # A prompt can also be taken from the two sides of a preference.
    if columns and missing and not (source.row_type == "preferences" and missing == ["prompt"]):
        shown = [*map(repr, columns[:_SHOWN_COLUMNS]), *(["…"] if len(columns) > _SHOWN_COLUMNS else [])]
        lower = {column.lower(): column for column in columns}
        near = {name: get_close_matches(wanted[name].lower(), lower, n=1) for name in missing}
        found = {name: lower[near[name][0]] if near.get(name) else "COLUMN" for name in missing}
        mapping = ", ".join(f"{name}: {column!r}" for name, column in (wanted | found).items() if name != column)
        raise DataError(
            f"source {source.name!r} ({source.kind} {source.id}): no row has the column "
            f"{' or '.join(repr(wanted[name]) for name in missing)}; its columns are {', '.join(shown)}. "
            f"Write in collect.sources which of them each field of {source.row_type} is:\n  columns: {{{mapping}}}"
        )


def map_columns(source: SourceParams, content: Mapping[str, Any]) -> dict[str, Any]:
    """Map a source's columns to the row type's fields; other columns are dropped.

    Raises:
        ValueError: a value is neither text nor number, nor a list of them.
    """
    row: dict[str, Any] = {}
    for name, field in ROW_TYPES[source.row_type].model_fields.items():
        if (column := source.columns.get(name, name)) in content:
            try:
                value = _plain(content[column])
            except (ValueError, RecursionError, ArithmeticError) as error:
                raise ValueError(f"{column}: {error}") from error
            if value != value:  # NaN is how tables leave a field out
                value = None
            if name in _LABELS and isinstance(value, int | float):
                value = str(value)
            elif name in _LISTS:
                value = _list(name, value)
            if field.is_required() or value not in (None, ""):  # an empty cell is how CSV leaves a field out
                row[name] = value
    row["id"] = None if row.get("id") in (None, "") else str(row["id"])
    if source.objective:
        row["objective"] = source.objective
    if source.row_type == "preferences" and row.get("prompt") is None:
        row |= _split_dialogue(row)
    if isinstance(row.get("prompt"), str) and row["prompt"]:
        row["prompt"] = source.template.replace("{prompt}", row["prompt"])
    return row


def number_rows(rows: Iterable[Mapping[str, Any]], source: SourceParams) -> None:
    """Make ids unique among all sources; a row without one gets its line's number, which no other row's id may be.

    A name has no dot of its own, so that source `a-b` with id 1 and source `a` with id b-1 differ.
    """
    name = source.name.replace("-", ".")
    given = {envelope["row"]["id"] for envelope in rows if "row" in envelope}
    for envelope in rows:
        if "row" in envelope:
            own = envelope["row"]["id"] or str(envelope["line"])
            while own in given and not envelope["row"]["id"]:
                own += ".line"
            envelope["row"]["id"] = f"{name}-{own}"


def _plain(value: object) -> Any:
    """The value as JSON can hold it: a decimal is a number, a tuple a list.

    Raises:
        ValueError: JSON or UTF-8 has no form for it.
    """
    if isinstance(value, str):
        value.encode("utf-8")  # a lone surrogate is no text
    elif isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    elif isinstance(value, Mapping):
        return {str(_plain(key)): _plain(inner) for key, inner in value.items()}
    elif isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    elif not (value is None or isinstance(value, bool | int | float)):
        raise ValueError(f"a value of type {type(value).__name__}; texts and numbers can be read")
    return value


def _list(name: str, value: Any) -> Any:
    """Parse a list: one, `[1, 2]` in a CSV cell, or its only item."""
    if isinstance(value, str) and (name == "ratings" or value.startswith("[")):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value
    single = isinstance(value, int | float) if name == "ratings" else value and isinstance(value, str)
    return [value] if single and not isinstance(value, bool) else value


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
