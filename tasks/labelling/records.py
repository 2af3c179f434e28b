"""Reading values out of records that other programs wrote: what is missing or of another type is a ValueError."""

from __future__ import annotations

import math
from typing import Any

from tasks.labelling.labels import Question, question_id
from tasks.labelling.tables import OPINIONS

__all__ = ["facts", "number", "question", "real", "texts", "value", "values"]


MOST_LABELS = 1000
"""Of one question; more are a mistake, and a database's integers have an end."""


def value(record: Any, key: str, kind: type[Any], default: Any = None) -> Any:
    """What stands under the key, of that type; the default where it is missing or null, unless that is None, too."""
    if not isinstance(record, dict):
        raise ValueError(f"not an object but {type(record).__name__}")
    found = record.get(key)
    found = default if found is None else found
    if not isinstance(found, kind):
        raise ValueError(f"{key}: {kind.__name__} expected, got {str(found)[:80]!r}")
    return found


def values(record: Any, key: str, kind: type[Any]) -> list[Any]:
    """What stands in the list under the key, each of that type; none where the key is missing."""
    found = value(record, key, list) if key in record else []
    wrong = next((one for one in found if not isinstance(one, kind)), None)
    if wrong is not None:
        raise ValueError(f"{key}: a list of {kind.__name__} expected, got {str(wrong)[:80]!r} in it")
    return list(found)


def real(found: Any, name: str) -> float | None:
    """A finite number or nothing."""
    if found is None:
        return None
    try:
        size = float(found) if isinstance(found, int | float) and not isinstance(found, bool) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        size = math.inf
    if not math.isfinite(size):
        raise ValueError(f"{name}: a number expected, got {str(found)[:80]!r}")
    return size


def number(found: Any, name: str) -> int | None:
    """A whole number or nothing."""
    size = real(found, name)
    if size is not None and size != int(size):
        raise ValueError(f"{name}: a whole number expected, got {str(found)[:80]!r}")
    return None if size is None else int(size)


def texts(record: Any, *keys: str) -> tuple[str, ...]:
    """The texts under these keys."""
    return tuple(value(record, key, str) for key in keys)


def facts(asked: Question) -> dict[str, Any]:
    """What `question` reads besides the texts; gold is "" where no answer is known."""
    return {"ours": asked.id, "policy_a": asked.policy_a, "policy_b": asked.policy_b, "gold": asked.gold or "",
            "reason": asked.reason, "priority": asked.priority, "labels_wanted": asked.labels_wanted}  # fmt: skip


def question(record: Any, known: dict[str, Any], prompt: str, one: str, other: str) -> Question:
    """Put one together; `known` may hold any of `facts`."""
    asked, first, second = texts(record, prompt, one, other)
    gold = known.get("gold") or None
    if gold not in (None, *OPINIONS):
        raise ValueError(f"gold: {gold!r} should be a, b, tie or both_bad")
    wanted = number(known.get("labels_wanted"), "labels_wanted")
    if wanted is not None and not 0 <= wanted <= MOST_LABELS:
        raise ValueError(f"labels_wanted: {wanted} should be from 0 to {MOST_LABELS}")
    return Question(
        id=known.get("ours") or question_id(asked, first, second),
        prompt=asked,
        response_a=first,
        response_b=second,
        policy_a=value(known, "policy_a", str, "unknown"),
        policy_b=value(known, "policy_b", str, "unknown"),
        reason=value(known, "reason", str, "imported"),
        gold=gold,
        priority=real(known.get("priority"), "priority") or 0.0,
        labels_wanted=1 if wanted is None else wanted,
    )
