"""Stage collect: read the rows of every source, with their provenance, and write a data card per source.

Writes `rows/<source>.jsonl` (one envelope a line: {file, line, row} or {file, line, raw, error}), `cards/<source>.json`
and `metrics.json`. Rows are not judged here; stage prepare does that.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.core.paths import Artifacts
from tasks.core.rows import write_json, write_rows
from tasks.data.pypi import sha256_of
from tasks.data.sources import READERS, SourceRows, collect_source
from tasks.rl.environments.service_bot import read_service_bot

if TYPE_CHECKING:
    from tasks.config.data import CollectParams, SourceParams

__all__ = ["collect"]

logger = logging.getLogger(__name__)


def collect(params: CollectParams, seed: int, artifacts: Artifacts) -> None:
    """Read every source and write its rows and card; the seed decides procedural sources alone.

    Raises:
        SourceError: a source cannot be reached, or is not what its checksum promises.
        DataError: a source is empty, or lacks a column.
    """
    readers = {**READERS, "service_bot": read_service_bot}
    counts = {}
    for source in params.sources:
        collected = collect_source(source, seed, readers)
        file = artifacts.out / "rows" / f"{source.name}.jsonl"
        counts[source.name] = write_rows(file, collected.rows)
        write_json(artifacts.out / "cards" / f"{source.name}.json", _data_card(source, collected, file))
        logger.info("%s: %d rows of type %s", source.name, counts[source.name], source.row_type)
    write_json(artifacts.out / "metrics.json", {"rows": sum(counts.values()), "rows_of": counts})


def _data_card(source: SourceParams, collected: SourceRows, file: Path) -> dict[str, object]:
    return {
        "name": source.name,
        "kind": source.kind,
        "type": source.row_type,
        **collected.origin,
        **{name: getattr(source, name) for name in ("licence", "columns", "template", "limit")},
        "rows": len(collected.rows),
        "unreadable": sum("error" in row for row in collected.rows),
        "sha256_of_rows": sha256_of(file),
    }


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("collect")
