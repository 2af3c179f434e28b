"""Page of recorded rollouts: one HTML file with its data, that needs no network and no server.

Responses are untrusted: the file holds them as JSON without a `<`, and its script only ever sets them as text.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.core.errors import DataError
from tasks.core.rows import read_table
from tasks.evals.report_text import display_name, load_template
from tasks.rl.hacking import DETECTORS, PREFIX, detectors_fired

__all__ = ["HISTORY", "ROLLOUTS", "render_page"]

ROLLOUTS, HISTORY = "rollouts.jsonl", "history.csv"
"""What a stage recorded, see `tasks.rl.rollout_records`, and its curves, with the values of its detectors."""


def render_page(folders: Mapping[str, Path], title: str, *, has_report: bool) -> str:
    """Render the page of stages, each with the folder of its files; with a link to the report if that lies beside it.

    Raises:
        DataError: no rollouts are recorded in any of them.
    """
    texts = {name: (folder / ROLLOUTS).read_text(encoding="utf-8") for name, folder in folders.items()}
    stages = [_stage_json(name, folders[name], text) for name, text in texts.items() if text]  # none of one that is off
    if not stages:
        raise DataError("no rollouts are recorded here: `rlhf run` records those of the stages that train by RL")
    data = "[" + ",\n".join(stages) + "]"
    page = load_template("rollouts.html.j2", {}, autoescape=True)
    return page.render(title=title, has_report=has_report, data=data.replace("<", "\\u003c"))


def _stage_json(name: str, folder: Path, text: str) -> str:
    """A stage as JSON: its name, its detectors, and the recorded rows as they stand in the file, for they are many."""
    rows = text.strip().replace("\n", ",\n")
    head = json.dumps({"name": display_name(name), **_detectors(folder / HISTORY)}, ensure_ascii=False)
    return f'{head[:-1]}, "rollouts": [\n{rows}\n]}}'


def _detectors(history: Path) -> dict[str, Any]:
    """`fired`: update → detectors that were at their thresholds; `findings`: what each of them found in training."""
    table = read_table(history)
    rows = [{column: float(value) for column, value in row.items() if value} for row in table]
    fired = {
        int(row["step"]): [item.name for item in DETECTORS if row.get(PREFIX + item.name, 0.0) >= item.threshold]
        for row in rows
    }
    findings = [
        {"detector": item.name, "update": update, "text": item.message(largest)}
        for item, update, largest in detectors_fired(rows)
    ]
    return {"fired": {update: names for update, names in fired.items() if names}, "findings": findings}
