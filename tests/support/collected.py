"""What stage collect leaves, and settings of stage prepare."""

import json
from pathlib import Path
from typing import Any

from tasks.config.data import PrepareParams

PREPARE = PrepareParams(
    prompt_words=3, min_words=5, max_words=12, near_duplicate_threshold=0.7, validation_share=0.2, test_share=0.2,
    gold_share=0.5, max_quarantine_share=0.1,
)  # fmt: skip


def write_collected(folder: Path, row_type: str, rows: list[dict[str, Any]], name: str = "mine") -> Path:
    """A source's card and envelopes; a row with `raw` is one that could not be parsed."""
    for part in ("cards", "rows"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "cards" / f"{name}.json").write_text(json.dumps({"kind": "local", "type": row_type}))
    with (folder / "rows" / f"{name}.jsonl").open("w") as file:
        for line, row in enumerate(rows, start=1):
            content = row if "raw" in row else {"row": row}
            file.write(json.dumps({"file": f"{name}.jsonl", "line": line, **content}) + "\n")
    return folder
