"""Writing JSON and CSV so that equal content is equal bytes on every machine, and flattening nested values."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["flatten", "write_json", "write_table"]


def flatten(value: object, prefix: str = "") -> dict[str, object]:
    """Flatten nested mappings: `{"a": {"b": 1}}` becomes `{"a.b": 1}`, each key after the prefix if there is one."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, object] = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write readable JSON, keys in the given order; the folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def write_table(path: Path, rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> None:
    """Write rows as CSV under a header; the columns are those of the first row unless given."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(columns or rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
