"""Fields of records that other programs wrote: what is missing or of another type is a ValueError."""

from __future__ import annotations

import math
from typing import Any

from tasks.labelling.labels import VALUED_CHOICES, Question, question_id

__all__ = ["get", "get_list", "optional_float", "optional_int", "parse_question", "question_metadata"]

MAX_LABELS_WANTED = 1000
"""Of one question; more are a mistake, and a database's integers have an end."""


def get(record: Any, key: str, kind: type[Any], default: Any = None) -> Any:
    """Return a value of that type; the default where it is missing or null, unless that is None, too."""
    if not isinstance(record, dict):
        raise ValueError(f"not an object but {type(record).__name__}")
    found = record.get(key)
    found = default if found is None else found
    if not isinstance(found, kind):
        raise ValueError(f"{key}: {kind.__name__} expected, got {str(found)[:80]!r}")
    return found


def get_list(record: Any, key: str, kind: type[Any]) -> list[Any]:
    """Return a list of values of that type, empty where the key is missing."""
    found = get(record, key, list) if key in record else []
    wrong = next((item for item in found if not isinstance(item, kind)), None)
    if wrong is not None:
        raise ValueError(f"{key}: a list of {kind.__name__} expected, got {str(wrong)[:80]!r} in it")
    return list(found)


def optional_float(found: Any, name: str) -> float | None:
    """Return a finite number or None."""
    if found is None:
        return None
    try:
        size = float(found) if isinstance(found, int | float) and not isinstance(found, bool) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        size = math.inf
    if not math.isfinite(size):
        raise ValueError(f"{name}: a number expected, got {str(found)[:80]!r}")
    return size


def optional_int(found: Any, name: str) -> int | None:
    """Return a whole number or None."""
    size = optional_float(found, name)
    if size is not None and size != int(size):
        raise ValueError(f"{name}: a whole number expected, got {str(found)[:80]!r}")
    return None if size is None else int(size)


def question_metadata(question: Question) -> dict[str, Any]:
    """Return what `parse_question` reads besides the texts; gold is "" where no answer is known."""
    names = ("policy_a", "policy_b", "reason", "priority", "labels_wanted")
    return {"question_id": question.id, "gold": question.gold or ""} | {name: getattr(question, name) for name in names}


def parse_question(texts: dict[str, Any], metadata: dict[str, Any], *keys: str) -> Question:
    """Build a question from the texts under three keys; the metadata may hold any of `question_metadata`."""
    prompt, response_a, response_b = (get(texts, key, str) for key in keys)
    gold = metadata.get("gold") or None
    if gold not in (None, *VALUED_CHOICES):
        raise ValueError(f"gold: {gold!r} should be a, b, tie or both_bad")
    wanted = optional_int(metadata.get("labels_wanted"), "labels_wanted")
    if wanted is not None and not 0 <= wanted <= MAX_LABELS_WANTED:
        raise ValueError(f"labels_wanted: {wanted} should be from 0 to {MAX_LABELS_WANTED}")
    return Question(
        id=metadata.get("question_id") or question_id(prompt, response_a, response_b),
        prompt=prompt,
        response_a=response_a,
        response_b=response_b,
        policy_a=get(metadata, "policy_a", str, "unknown"),
        policy_b=get(metadata, "policy_b", str, "unknown"),
        reason=get(metadata, "reason", str, "imported"),
        gold=gold,
        priority=optional_float(metadata.get("priority"), "priority") or 0.0,
        labels_wanted=1 if wanted is None else wanted,
    )
