"""Demonstration dialogues for the service_bot environment."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from tasks.core.sections.collect import SourceParams
from tasks.rl.environments.service_bot import generate_dialogues

__all__ = ["read_service_bot"]

_DEFAULT_DIALOGUES = 1000  # generated without end


def read_service_bot(source: SourceParams, seed: int) -> tuple[Iterable[tuple[str, int, object]], dict[str, object]]:
    """Generate `limit` dialogues from the seed: the user's opening, the dialogue, and the goal as answer.

    Raises:
        DataError: there is no such task.
    """
    tasks = source.id.split(",")
    rows = list(islice(generate_dialogues(tasks, seed), source.limit or _DEFAULT_DIALOGUES))
    origin: dict[str, object] = {"source": "scripted dialogues of this project", "wishes": tasks, "seed": seed}
    return ((f"service_bot/{source.id}", line, row) for line, row in enumerate(rows, start=1)), origin
