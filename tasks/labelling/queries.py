"""Which events stand, and which items are open for whom, as SQL for both kinds of database.

Nothing here is correlated: each subquery is one pass, also where the database knows no statistics of its tables yet.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Select, and_, func, select
from sqlalchemy.orm import aliased

from tasks.labelling.tables import Event, Item

__all__ = [
    "ARGILLA",
    "LABEL_STUDIO",
    "MODEL",
    "PERSON",
    "STANDS",
    "count_of",
    "gold_for",
    "last_event",
    "open_for",
    "wanting",
]

MODEL = "model:"
"""How the name of a labeller begins that is no person."""

PERSON, ARGILLA, LABEL_STUDIO = "person-", "argilla:", "label-studio:"
"""How the name begins of a person whom we know by a pseudonym, by Argilla's id or by Label Studio's number alone."""

_each = aliased(Event)

STANDS = and_(Event.kind == "label", Event.id.in_(select(func.max(_each.id)).group_by(_each.item_id, _each.labeller)))
"""Of an event: it is a label, and the last that this labeller did on this item."""


def wanting() -> Select[tuple[Item, int]]:
    """Items that want labels still, gold left out, and how many they have, in the order in which they are shown."""
    counts = and_(STANDS, Event.choice != "skip", ~Event.labeller.startswith(MODEL, autoescape=True))
    have = select(Event.item_id, func.count().label("labels")).where(counts).group_by(Event.item_id).subquery()
    number = func.coalesce(have.c.labels, 0)
    items = select(Item, number).outerjoin(have, have.c.item_id == Item.id)
    wanted = items.where(Item.gold.is_(None), number < Item.labels_wanted)
    return wanted.order_by(Item.priority.desc(), Item.created_at, Item.id)


def open_for(labeller: str) -> Select[tuple[Item, int]]:
    """Those of them that this labeller has not answered."""
    return wanting().where(_unanswered(labeller))


def gold_for(labeller: str) -> Select[tuple[Item]]:
    """Gold items that this labeller has not answered."""
    return select(Item).where(Item.gold.is_not(None), _unanswered(labeller)).order_by(Item.id)


def last_event(item_id: str, labeller: str) -> Select[tuple[Event]]:
    """A labeller's last event on an item."""
    mine = select(Event).where(Event.item_id == item_id, Event.labeller == labeller)
    return mine.order_by(Event.id.desc()).limit(1)


def count_of(statement: Select[Any]) -> Select[tuple[int]]:
    """How many rows the statement would give."""
    return select(func.count()).select_from(statement.order_by(None).subquery())


def _unanswered(labeller: str) -> ColumnElement[bool]:
    return Item.id.not_in(select(Event.item_id).where(STANDS, Event.labeller == labeller))
