"""All operations on the labelling database: what is asked of whom next, and what they answered.

An item is open for a labeller who has not answered it, while fewer than `labels_wanted` people have; a gold item is
open for everybody. A skip is an answer, so the item does not come back to the one who skipped it, but it does not count
for `labels_wanted`, so somebody else is asked. Labels of models (`model:…`) do not count either: people are asked all
the same.

An item that is on a labeller's screen is leased to them, so that nobody else is handed it needlessly. Leases are in the
memory of this process and end by themselves: after a crash two people may be asked the same, and no item is lost.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from sqlalchemy import Select, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, sessionmaker

from tasks.core.errors import DataError
from tasks.labelling.answers import Answer, ConflictError, Progress, Recorded, Task, answer_of, is_swapped
from tasks.labelling.database import connect, shown
from tasks.labelling.leases import Leases
from tasks.labelling.queries import MODEL, STANDS, count_of, gold_for, last_event, open_for, wanting
from tasks.labelling.tables import Event, Item, Labeller

__all__ = ["LabelStore"]

LEASE_SECONDS = 900.0

GOLD_SHARE = 0.1
"""At least so many of the items that a labeller is shown are gold, until they have seen all gold ones."""

NAME = re.compile(r"\w(?:[\w .@+-]{0,62}[\w.])?")


class LabelStore:
    """The labelling database; safe to use from several threads at once."""

    def __init__(self, url: str, *, lease_seconds: float = LEASE_SECONDS) -> None:
        """Open it, and bring its tables up to date.

        Raises:
            ConfigError, SourceError, DataError: as `tasks.labelling.database.connect`.
        """
        self._engine = connect(url)
        self.address = shown(url)
        self._read = sessionmaker(self._engine, expire_on_commit=False)
        self._write = sessionmaker(self._engine.execution_options(writes=True), expire_on_commit=False)
        self._leases = Leases(lease_seconds)

    def close(self) -> None:
        """Close its connections."""
        self._engine.dispose()

    def add_items(self, items: Sequence[Item]) -> int:
        """Add those whose id is new, all or none; how many that were.

        Raises:
            DataError: an id stands for another pair already.
        """
        with self._write.begin() as session:
            return sum(_add_item(session, item) for item in items)

    def add_labeller(self, name: str, password_hash: str | None = None) -> bool:
        """Add a labeller, or give a known one this password; whether they are new.

        Raises:
            DataError: no name for a labeller.
        """
        _check_name(name, password_hash)
        with self._write.begin() as session:
            known = session.get(Labeller, name)
            if known is None:
                session.add(Labeller(name=name, password_hash=password_hash))
            elif password_hash:
                known.password_hash = password_hash
            return known is None

    def labeller(self, name: str) -> Labeller | None:
        """By name."""
        with self._read() as session:
            return session.get(Labeller, name)

    def labellers(self) -> list[str]:
        """The names of those who can sign in."""
        with self._read() as session:
            able = select(Labeller.name).where(Labeller.password_hash.is_not(None)).order_by(Labeller.name)
            return list(session.scalars(able))

    def items(self) -> list[Item]:
        """All, in the order in which they were added."""
        with self._read() as session:
            return list(session.scalars(select(Item).order_by(Item.created_at, Item.id)))

    def next_item(self, labeller: str) -> Task | None:
        """What to ask the labeller next: first what is on their screen already, then by priority, gold mixed in.

        None: nothing is open for them, or all of it is on others' screens (`Progress.elsewhere`).
        """
        with self._leases.lock, self._read() as session:
            item = self._on_screen(session, labeller) or self._choose(session, labeller)
            if item is None:
                return None
            self._leases.take(labeller, item.id)
            return _task(session, item, labeller)

    def record(self, labeller: str, item_id: str, token: str, after: int, answer: Answer) -> Recorded:
        """Add an answer, in the stored order of the item; the same one sent twice counts once.

        An answer that `labels_wanted` does not ask for any more is kept: whoever was asked is not turned away.

        Args:
            token: made by the page that asked.
            after: of the Task that was asked.

        Raises:
            ConflictError: the labeller has answered the item in the meantime, elsewhere or otherwise.
            DataError: no such item or labeller.
        """
        says = {name: getattr(answer, name) for name in Answer.__dataclass_fields__}
        event = Event(token=token, item_id=item_id, labeller=labeller, after=after, kind="label", **says)
        recorded = self._add(event)
        self._leases.release(labeller, item_id)
        return recorded

    def undo(self, labeller: str, token: str, event_id: int) -> Recorded:
        """Take an answer back and put its item on the labeller's screen again; the same one sent twice counts once.

        Raises:
            ConflictError: the answer does not stand any more.
            DataError: the labeller has given no such answer.
        """
        with self._read() as session:
            undone = session.get(Event, event_id)
        if undone is None or undone.labeller != labeller or undone.kind != "label":
            raise DataError(f"{labeller} has given no answer of number {event_id}")
        event = Event(token=token, item_id=undone.item_id, labeller=labeller, after=event_id, kind="undo")
        event.swapped = undone.swapped
        recorded = self._add(event)
        if not recorded.repeated:
            self._leases.take(labeller, undone.item_id)
        return recorded

    def last_label(self, labeller: str) -> Event | None:
        """The answer that the labeller gave last, of those that stand."""
        with self._read() as session:
            mine = select(Event).where(STANDS, Event.labeller == labeller).order_by(Event.id.desc()).limit(1)
            return session.scalar(mine)

    def current_labels(self) -> list[Event]:
        """The last event of each labeller on each item, where that is a label: what they think now; skips too."""
        with self._read() as session:
            return list(session.scalars(select(Event).where(STANDS).order_by(Event.id)))

    def progress(self, labeller: str) -> Progress:
        """How far the labeller is."""
        done = select(func.count()).select_from(Event).where(STANDS, Event.labeller == labeller)
        with self._read() as session:
            left = sum(_number(session, count_of(statement(labeller))) for statement in (open_for, gold_for))
            others = self._leases.of_others(labeller)
            leased = session.execute(open_for(labeller).where(Item.id.in_(others)))
            elsewhere = sum(number + others[item.id] >= item.labels_wanted for item, number in leased)
            return Progress(done=_number(session, done), left=left, elsewhere=elsewhere)

    def open_items(self) -> tuple[int, int]:
        """How many items want labels still, gold left out, and how many there are, with gold."""
        with self._read() as session:
            return _number(session, count_of(wanting())), _number(session, count_of(select(Item.id)))

    def _on_screen(self, session: Session, labeller: str) -> Item | None:
        own = self._leases.own(labeller)
        last = session.scalar(last_event(own, labeller)) if own else None
        return session.get(Item, own) if own and (last is None or last.kind != "label") else None

    def _choose(self, session: Session, labeller: str) -> Item | None:
        """Gold at random places, the same ones if it is asked again: chance depends on the labeller's events alone."""
        events = _number(session, select(func.count()).select_from(Event).where(Event.labeller == labeller))
        chance = random.Random(f"{labeller}\0{events}")
        gold = list(session.scalars(gold_for(labeller)))
        ordinary = self._first_free(session, labeller)
        if not gold or not ordinary:
            return chance.choice(gold) if gold else ordinary
        left = _number(session, count_of(open_for(labeller)))
        share = max(len(gold) / (len(gold) + left), GOLD_SHARE)
        return chance.choice(gold) if chance.random() < share else ordinary

    def _first_free(self, session: Session, labeller: str) -> Item | None:
        others = self._leases.of_others(labeller)
        # Each screen takes one place of one item, so of one row more than there are screens one is free.
        rows = session.execute(open_for(labeller).limit(others.total() + 1))
        return next((item for item, number in rows if number + others[item.id] < item.labels_wanted), None)

    def _add(self, event: Event) -> Recorded:
        try:
            with self._write.begin() as session:
                repeated = _already_there(session, event)
                if repeated is None:
                    session.add(event)
        except IntegrityError:  # another connection has added it, or another answer, between our look and our writing
            with self._read() as session:
                repeated = _already_there(session, event)
                if repeated is None:
                    raise
        return Recorded(repeated or event, repeated is not None)


def _already_there(session: Session, event: Event) -> Event | None:
    """The event that this one repeats.

    Raises:
        ConflictError: another click was faster.
    """
    if session.get(Item, event.item_id) is None or session.get(Labeller, event.labeller) is None:
        raise DataError(f"no item {event.item_id!r}, or no labeller {event.labeller!r}, is in the database")
    last = session.scalar(last_event(event.item_id, event.labeller))
    sent = session.scalar(select(Event).where(Event.token == event.token))
    if sent is None and (last.id if last else 0) == event.after:
        return None
    if sent is None or _says(sent) != _says(event):
        session.expunge_all()  # what stands is read after the transaction, too
        raise ConflictError(f"{event.labeller} has answered {event.item_id} in the meantime; nothing was changed", last)
    return sent


def _says(event: Event) -> tuple[object, ...]:
    """What makes two clicks the same; the time that they took does not."""
    answer = (event.choice, event.strength, event.rating_a, event.rating_b, event.comment)
    return event.item_id, event.labeller, event.after, event.kind, *answer


def _add_item(session: Session, item: Item) -> bool:
    known = session.get(Item, item.id)
    if known is None:
        session.add(item)
        return True
    texts = ("prompt", "response_a", "response_b")
    if any(getattr(known, name) != getattr(item, name) for name in texts):
        raise DataError(f"item {item.id!r} is in the database with other texts; give the new pair an id of its own")
    return False


def _task(session: Session, item: Item, labeller: str) -> Task:
    last = session.scalar(last_event(item.id, labeller))
    undone = session.get(Event, last.after) if last else None
    return Task(item, is_swapped(item.id, labeller), last.id if last else 0, answer_of(undone) if undone else None)


def _check_name(name: str, password_hash: str | None) -> None:
    person = name.removeprefix(MODEL)
    is_model = person != name
    if len(name) > 64 or (not is_model and not NAME.fullmatch(name)) or (is_model and (password_hash or not person)):
        raise DataError(
            f"{name!r} is no name for a labeller: write 1 to 64 letters, digits, spaces and . @ + - _, the first a "
            f"letter or digit; names that begin with {MODEL} are models', and have no password"
        )


def _number(session: Session, statement: Select[tuple[int]]) -> int:
    return session.scalar(statement) or 0
