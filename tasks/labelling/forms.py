"""Buttons of the labelling page, and the values of its form's fields."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from tasks.core.errors import DataError
from tasks.labelling.labels import Label

__all__ = ["BUTTONS", "RATINGS", "Button", "label_text", "new_token", "read_label", "read_number", "read_token"]


@dataclass(frozen=True)
class Button:
    """A button: the value it sends, its key and text; `group` is the response that it favours."""

    value: str
    key: str
    text: str
    group: str
    choice: str
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


def label_text(label: Label) -> str:
    """Return the text of the label's button."""
    texts = {(button.choice, button.strength): button.text for button in BUTTONS}
    return texts.get((label.choice, label.strength), f"{label.choice.upper()} better")


def read_label(fields: Mapping[str, str], labeller: str) -> Label:
    """Return the label in the form, in the order shown; the store refuses values that the page does not offer.

    Raises:
        DataError: no button was pressed, or a rating is no number.
    """
    button = next((button for button in BUTTONS if button.value == fields.get("answer")), None)
    if button is None:
        raise DataError(f"answer: got {fields.get('answer', '')!r}; go back and choose one of the buttons")
    return Label(
        fields.get("question", ""),
        labeller,
        button.choice,
        strength=button.strength,
        rating_a=read_number(fields, "rating_a") if fields.get("rating_a") else None,
        rating_b=read_number(fields, "rating_b") if fields.get("rating_b") else None,
        comment=fields.get("comment", "").replace("\r\n", "\n").strip() or None,
        seconds=_seconds_since(fields.get("shown", "")),
    )


def read_number(fields: Mapping[str, str], name: str) -> int:
    """Return a field that holds a whole number."""
    text = fields.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise DataError(f"{name}: got {text!r}, expected a number")
    return int(text)


def new_token() -> str:
    """Return an id for one form that is shown."""
    return str(uuid.uuid4())


def read_token(fields: Mapping[str, str]) -> str:
    """Return the id of the form that was sent."""
    try:
        return str(uuid.UUID(fields.get("token", "")))
    except ValueError:
        raise DataError(f"token: got {fields.get('token')!r}, which this page has not made") from None


def _seconds_since(shown: str) -> float | None:
    """Return None where the clock was set back, or the field is not ours: the answer counts all the same."""
    try:
        seconds = time.time() - float(shown)
    except ValueError:
        return None
    return round(seconds, 3) if math.isfinite(seconds) and 0 <= seconds < 86400 else None
