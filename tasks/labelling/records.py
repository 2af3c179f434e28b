"""Reading values out of records that other programs wrote: what is missing or of another type is a ValueError."""

from __future__ import annotations

from typing import Any

from tasks.labelling.labels import Question, question_id
from tasks.labelling.tables import OPINIONS

__all__ = ["number", "question", "texts", "value"]


def value(record: Any, key: str, kind: type[Any], default: Any = None) -> Any:
    """What stands under the key, of that type; the default where it is missing or null, unless that is None, too."""
    if not isinstance(record, dict):
        raise ValueError(f"not an object but {type(record).__name__}")
    found = record.get(key)
    found = default if found is None else found
    if not isinstance(found, kind):
        raise ValueError(f"{key}: {kind.__name__} expected, got {str(found)[:80]!r}")
    return found


def number(found: Any, name: str) -> int | None:
    """A whole number or nothing."""
    if found is not None and (isinstance(found, bool) or not isinstance(found, int | float) or found != int(found)):
        raise ValueError(f"{name}: a whole number expected, got {str(found)[:80]!r}")
    return None if found is None else int(found)


def texts(record: Any, *keys: str) -> tuple[str, ...]:
    """The texts under these keys."""
    return tuple(value(record, key, str) for key in keys)


def question(record: Any, facts: dict[str, Any], prompt: str, one: str, other: str, name: str | None) -> Question:
    """Put one together; `facts` may say which policies wrote and what is right, `name` which id it has here."""
    asked, first, second = texts(record, prompt, one, other)
    gold = facts.get("gold") or None
    if gold not in (None, *OPINIONS):
        raise ValueError(f"gold: {gold!r} should be a, b, tie or both_bad")
    policy_a, policy_b = (value(facts, key, str, "unknown") for key in ("policy_a", "policy_b"))
    return Question(
        name or question_id(asked, first, second), asked, first, second, policy_a, policy_b, "imported", gold
    )
