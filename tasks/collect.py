"""Stage collect: rows from every source in params, each with where it came from, and a data card per source.

Writes `rows/<source>.jsonl` (one envelope a line: {file, line, row} or {file, line, raw, error}), `cards/<source>.json`
and `metrics.json`. Rows are not judged here; stage prepare does that.
"""

from __future__ import annotations

import logging
from pathlib import Path

from tasks.core.files import write_json
from tasks.core.schema import write_rows
from tasks.core.sections.collect import CollectParams, SourceParams
from tasks.data.pypi import sha256_of
from tasks.data.sources import Collected, collect_source

__all__ = ["collect"]

logger = logging.getLogger(__name__)


def collect(params: CollectParams, seed: int, *, out: Path) -> None:
    """Read every source and write its rows and card.

    Args:
        params: the sources.
        seed: decides procedural sources (reasoning-gym) only.
        out: receives `rows/`, `cards/` and `metrics.json`.

    Raises:
        SourceError: a source cannot be reached, or is not what its checksum promises.
        DataError: a source is empty, or lacks a column.
    """
    counts = {}
    for source in params.sources:
        collected = collect_source(source, seed)
        file = out / "rows" / f"{source.name}.jsonl"
        counts[source.name] = write_rows(file, collected.rows)
        write_json(out / "cards" / f"{source.name}.json", _card(source, collected, file))
        logger.info("%s: %d rows of type %s", source.name, counts[source.name], source.rows)
    write_json(out / "metrics.json", {"rows": sum(counts.values()), "rows_of": counts})


def _card(source: SourceParams, collected: Collected, file: Path) -> dict[str, object]:
    unreadable = sum("error" in row for row in collected.rows)
    return {
        "name": source.name,
        "kind": source.kind,
        "type": source.rows,
        **collected.origin,
        "licence": source.licence,
        "columns": source.columns,
        "template": source.template,
        "limit": source.limit,
        "rows": len(collected.rows),
        "unreadable": unreadable,
        "sha256_of_rows": sha256_of(file),
    }


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("collect")
