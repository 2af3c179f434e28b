"""Dialogues as rows of a source."""

from __future__ import annotations

import json

from tasks.config.data import SourceParams
from tasks.core.rows import Demonstration
from tasks.data.sources import collect_source
from tasks.rl.environments.service_bot import read_service_bot

READERS = {"service_bot": read_service_bot}


def test_dialogues_are_demonstrations_with_the_goal_as_their_answer() -> None:
    source = SourceParams(name="talks", kind="service_bot", row_type="demonstrations", id="taxi,table", limit=30)
    collected = collect_source(source, 7, READERS)
    rows = [Demonstration.model_validate(item["row"]) for item in collected.rows]
    assert len(rows) == 30
    assert {json.loads(row.answer or "")["wish"] for row in rows} == {"taxi", "table"}
    assert collected.origin == {
        "source": "scripted dialogues of this project",
        "wishes": ["taxi", "table"],
        "seed": 7,
    }
    assert collect_source(source, 7, READERS).rows == collected.rows
    assert collect_source(source, 8, READERS).rows != collected.rows
