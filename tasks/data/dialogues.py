"""Dialogues of a scripted user and a good bot, for the environment of the same name."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from tasks.core.sections.collect import SourceParams
from tasks.rl.environments.service_bot import generate_dialogues

__all__ = ["read_service_bot"]

_DEFAULT_DIALOGUES = 1000  # there is no end of them


def read_service_bot(source: SourceParams, seed: int) -> tuple[Iterable[tuple[str, int, object]], dict[str, object]]:
    """Dialogues made from the seed, `limit` of them: the user's opening, what both say then, and the goal as answer.

    Raises:
        DataError: there is no such wish.
    """
    tasks = source.id.split(",")
    rows = list(islice(generate_dialogues(tasks, seed), source.limit or _DEFAULT_DIALOGUES))
    origin: dict[str, object] = {"source": "scripted dialogues of this project", "wishes": tasks, "seed": seed}
    return ((f"service_bot/{source.id}", line, row) for line, row in enumerate(rows, start=1)), origin
