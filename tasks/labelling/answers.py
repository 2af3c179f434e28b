"""What goes in and out of the labelling database's operations: questions, answers, and what became of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from tasks.core.errors import DataError
from tasks.labelling.tables import CHOICES, SIDES, Choice, Event, Item

__all__ = [
    "LONGEST_COMMENT",
    "NUL",
    "TURNED",
    "Answer",
    "ConflictError",
    "Progress",
    "Recorded",
    "Task",
    "answer_of",
    "as_shown",
    "comment_flaw",
    "is_swapped",
]

LONGEST_COMMENT = 5000

NUL = "holds a NUL character, which PostgreSQL cannot keep"

TURNED: dict[str, Choice] = {"a": "b", "b": "a", "tie": "tie", "both_bad": "both_bad", "skip": "skip"}


class ConflictError(DataError):
    """The click was made on a state that is no longer; `standing` is the labeller's last event on the item."""

    def __init__(self, message: str, standing: Event | None) -> None:
        super().__init__(message)
        self.standing = standing


@dataclass(frozen=True)
class Answer:
    """What a labeller says of a pair. `swapped`: response_b was shown first, whatever a and b mean here.

    What cannot be kept in a comment is no matter here, see `comment_flaw`: what is in the database must stay readable.

    Raises:
        DataError: a value that no answer can have.
    """

    choice: Choice
    strength: int | None = None
    rating_a: int | None = None
    rating_b: int | None = None
    comment: str | None = None
    swapped: bool = False
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.choice not in CHOICES:
            raise DataError(f"choice: got {self.choice!r}, expected one of {', '.join(CHOICES)}")
        if self.strength is not None and (self.strength not in (1, 2, 3) or self.choice not in SIDES):
            raise DataError(f"strength: got {self.strength}, expected 1, 2 or 3, and only where one response is better")
        for rating in (self.rating_a, self.rating_b):
            if rating is not None and rating not in range(1, 6):
                raise DataError(f"rating: got {rating}, expected 1 to 5")

    def turned(self) -> Answer:
        """From the order shown to the stored one, or back: a and b exchanged where the pair was swapped."""
        if not self.swapped:
            return self
        return replace(self, choice=TURNED[self.choice], rating_a=self.rating_b, rating_b=self.rating_a)


def comment_flaw(comment: str | None) -> str | None:
    """Why a labeller's comment cannot be kept, or None where it can."""
    if comment and len(comment) > LONGEST_COMMENT:
        return f"comment: {len(comment)} characters, at most {LONGEST_COMMENT} are kept"
    return f"comment: {NUL}" if comment and "\0" in comment else None


def as_shown(answer: Answer, swapped: bool) -> Answer:
    """An answer of the stored order in that of the page; the order it was given in may be another, as of an import.

    Args:
        swapped: whether the page shows response_b first.
    """
    return replace(answer, swapped=swapped).turned()


def answer_of(event: Event) -> Answer | None:
    """What an event says, in the stored order; None of an undoing."""
    if event.choice is None:
        return None
    return Answer(
        event.choice,  # type: ignore[arg-type]  # the column is a string, and Answer checks it
        strength=event.strength,
        rating_a=event.rating_a,
        rating_b=event.rating_b,
        comment=event.comment,
        swapped=event.swapped,
        seconds=event.seconds,
    )


@dataclass(frozen=True)
class Task:
    """An item for one labeller. `after` goes back with the answer; `previous` is an answer that they have undone."""

    item: Item
    swapped: bool
    after: int
    previous: Answer | None


@dataclass(frozen=True)
class Recorded:
    """An answer or undoing that is in the database. `repeated`: it was there already, and was not added again."""

    event: Event
    repeated: bool


@dataclass(frozen=True)
class Progress:
    """Of one labeller: answers that stand, items still open for them, and of these those on others' screens now."""

    done: int
    left: int
    elsewhere: int


def is_swapped(item_id: str, labeller: str) -> bool:
    """Whether this labeller sees response_b first: even chances, and always the same for the same two."""
    return bool(hashlib.sha256(f"{item_id}\0{labeller}".encode()).digest()[0] % 2)
