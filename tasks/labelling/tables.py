"""What the labelling database holds. Events are only ever added: what a labeller thinks now is their last event."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal, TypeAlias

from sqlalchemy import CheckConstraint, DateTime, ForeignKey, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

__all__ = ["CHOICES", "OPINIONS", "SIDES", "Base", "Choice", "Event", "Item", "Labeller"]

Choice: TypeAlias = Literal["a", "b", "tie", "both_bad", "skip"]
CHOICES: tuple[Choice, ...] = ("a", "b", "tie", "both_bad", "skip")
"""Of a pair: the first is better, the second is, they are alike and good, alike and bad, no opinion."""

OPINIONS = CHOICES[:-1]
"""Those that can be right or wrong."""

SIDES = CHOICES[:2]
"""Those that prefer one response, and can say how much."""


class Base(DeclarativeBase):
    """All tables."""


def _now() -> datetime:
    return datetime.now(UTC)


class Item(Base):
    """Two responses to one prompt, to be compared; a and b are the stored order, not the one that a labeller sees."""

    __tablename__ = "items"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    prompt: Mapped[str] = mapped_column(Text)
    response_a: Mapped[str] = mapped_column(Text)
    response_b: Mapped[str] = mapped_column(Text)
    policy_a: Mapped[str] = mapped_column(String(64), doc="Which policy wrote it: sft, ppo, …")
    policy_b: Mapped[str] = mapped_column(String(64))
    gold: Mapped[str | None] = mapped_column(String(8), doc="The right choice, where the item tests labellers.")
    reason: Mapped[str] = mapped_column(String(32), doc="Why it is asked: random, disagreement, gold, imported.")
    priority: Mapped[float] = mapped_column(default=0.0, doc="Items of higher priority are shown first.")
    labels_wanted: Mapped[int] = mapped_column(default=1, doc="By how many labellers; gold items go to all of them.")
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=_now)


class Labeller(Base):
    """A person who signs in, or a model that labels by a rubric."""

    __tablename__ = "labellers"

    name: Mapped[str] = mapped_column(String(64), primary_key=True, doc="For a model: `model:` and its name.")
    password_hash: Mapped[str | None] = mapped_column(String(256), doc="None for a model, and nobody signs in as one.")
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=_now)


class Event(Base):
    """A click: a label, or the undoing of one. `after` makes a second vote on the same state impossible."""

    __tablename__ = "events"
    __table_args__ = (
        UniqueConstraint("item_id", "labeller", "after"),
        CheckConstraint("kind in ('label', 'undo')"),
        CheckConstraint("(kind = 'label') = (choice is not null)"),
    )

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    token: Mapped[str] = mapped_column(String(36), unique=True, doc="Made by the page: sent twice, it counts once.")
    item_id: Mapped[str] = mapped_column(ForeignKey("items.id"), index=True)
    labeller: Mapped[str] = mapped_column(ForeignKey("labellers.name"), index=True)
    after: Mapped[int] = mapped_column(default=0, doc="Id of this labeller's event on this item before it; 0: none.")
    kind: Mapped[str] = mapped_column(String(8))
    choice: Mapped[str | None] = mapped_column(String(8), doc="One of CHOICES, in the stored order.")
    strength: Mapped[int | None] = mapped_column(doc="How much better: 1 slightly, 2 clearly, 3 far; for a and b only.")
    rating_a: Mapped[int | None] = mapped_column(doc="Direct rating, 1 to 5.")
    rating_b: Mapped[int | None] = mapped_column()
    comment: Mapped[str | None] = mapped_column(Text)
    swapped: Mapped[bool] = mapped_column(default=False, doc="Whether response_b was shown first.")
    seconds: Mapped[float | None] = mapped_column(doc="From the item's display to the click.")
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=_now)
