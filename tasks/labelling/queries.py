"""Which events stand, and which items are open for whom, as SQL for both kinds of database."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, ScalarSelect, Select, and_, exists, func, select
from sqlalchemy.orm import aliased

from tasks.labelling.tables import Event, Item

__all__ = ["MODEL", "STANDS", "count_of", "gold_for", "labels", "last_event", "open_for", "wanting"]

MODEL = "model:"
"""How the name of a labeller begins that is no person."""

_later = aliased(Event)
_is_last: ColumnElement[bool] = ~exists().where(
    _later.item_id == Event.item_id, _later.labeller == Event.labeller, _later.after == Event.id
)

STANDS = and_(Event.kind == "label", _is_last)
"""Of an event: it is a label, and no later event of this labeller on this item takes it back or replaces it."""


def labels() -> ScalarSelect[int]:
    """How many people's labels an item has; skips do not count."""
    counts = and_(STANDS, Event.choice != "skip", ~Event.labeller.startswith(MODEL, autoescape=True))
    of_item = select(func.count()).select_from(Event).where(counts, Event.item_id == Item.id)
    return of_item.correlate(Item).scalar_subquery()


def wanting() -> Select[tuple[Item]]:
    """Items that want labels still, gold left out, in the order in which they are shown."""
    wanted = select(Item).where(Item.gold.is_(None), labels() < Item.labels_wanted)
    return wanted.order_by(Item.priority.desc(), Item.created_at, Item.id)


def open_for(labeller: str) -> Select[tuple[Item]]:
    """Those of them that this labeller has not answered."""
    return wanting().where(~_answered(labeller))


def gold_for(labeller: str) -> Select[tuple[Item]]:
    """Gold items that this labeller has not answered."""
    return select(Item).where(Item.gold.is_not(None), ~_answered(labeller)).order_by(Item.id)


def last_event(item_id: str, labeller: str) -> Select[tuple[Event]]:
    """A labeller's last event on an item."""
    mine = select(Event).where(Event.item_id == item_id, Event.labeller == labeller)
    return mine.order_by(Event.id.desc()).limit(1)


def count_of(statement: Select[Any]) -> Select[tuple[int]]:
    """How many rows the statement would give."""
    return select(func.count()).select_from(statement.order_by(None).subquery())


def _answered(labeller: str) -> ColumnElement[bool]:
    return exists().where(STANDS, Event.labeller == labeller, Event.item_id == Item.id).correlate(Item)
