"""How an answer looks on the page: its buttons and words, and what the fields of its form mean."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from tasks.core.errors import DataError
from tasks.labelling.answers import Answer, comment_flaw
from tasks.labelling.tables import Choice

__all__ = ["BUTTONS", "RATINGS", "Button", "new_token", "read_answer", "read_number", "read_token", "words"]


@dataclass(frozen=True)
class Button:
    """What a button sends, its key, and its words; `group` is the response that it favours."""

    value: str
    key: str
    words: str
    group: str
    choice: Choice
    strength: int | None = None


BUTTONS = (
    Button("a3", "1", "A far better", "a", "a", 3),
    Button("a2", "2", "A clearly better", "a", "a", 2),
    Button("a1", "3", "A slightly better", "a", "a", 1),
    Button("tie", "4", "Equally good", "none", "tie"),
    Button("both_bad", "5", "Both bad", "none", "both_bad"),
    Button("skip", "6", "Skip", "none", "skip"),
    Button("b1", "7", "B slightly better", "b", "b", 1),
    Button("b2", "8", "B clearly better", "b", "b", 2),
    Button("b3", "9", "B far better", "b", "b", 3),
)

RATINGS = {1: "very bad", 2: "bad", 3: "fair", 4: "good", 5: "very good"}


def words(answer: Answer) -> str:
    """The answer as its button says it."""
    said = ((button.choice, button.strength, button.words) for button in BUTTONS)
    exact = {(choice, strength): text for choice, strength, text in said}
    return exact.get((answer.choice, answer.strength), f"{answer.choice.upper()} better")


def read_answer(fields: Mapping[str, str], *, swapped: bool) -> Answer:
    """What the form says, in the order shown.

    Raises:
        DataError: a field is missing or has a value that the page does not offer.
    """
    button = next((button for button in BUTTONS if button.value == fields.get("answer")), None)
    if button is None:
        raise DataError(f"answer: got {fields.get('answer', '')!r}; go back and choose one of the buttons")
    comment = fields.get("comment", "").replace("\r\n", "\n").strip() or None
    if flaw := comment_flaw(comment):
        raise DataError(flaw)
    return Answer(
        button.choice,
        strength=button.strength,
        rating_a=read_number(fields, "rating_a") if fields.get("rating_a") else None,
        rating_b=read_number(fields, "rating_b") if fields.get("rating_b") else None,
        comment=comment,
        swapped=swapped,
        seconds=_seconds_since(fields.get("shown", "")),
    )


def read_number(fields: Mapping[str, str], name: str) -> int:
    """A field that holds a whole number."""
    text = fields.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise DataError(f"{name}: got {text!r}, expected a number")
    return int(text)


def new_token() -> str:
    """The mark of one form that was shown."""
    return str(uuid.uuid4())


def read_token(fields: Mapping[str, str]) -> str:
    """The form's mark."""
    try:
        return str(uuid.UUID(fields.get("token", "")))
    except ValueError:
        raise DataError(f"token: got {fields.get('token')!r}, which this page has not made") from None


def _seconds_since(shown: str) -> float | None:
    """None where the clock was set back, or the field is not ours: the answer is worth more than its time."""
    try:
        seconds = time.time() - float(shown)
    except ValueError:
        return None
    return round(seconds, 3) if math.isfinite(seconds) and 0 <= seconds < 86400 else None
