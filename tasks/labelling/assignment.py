"""Assignment of questions to labellers, and leases on the questions on their screens.

A question on a screen is leased, so that nobody else is handed it needlessly. Leases are in the memory of this process
and end by themselves: after a crash two people may be asked the same, and no question is lost.
"""

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, func, select

from tasks.labelling import database as db
from tasks.labelling.labels import MODEL_PREFIX, Question, pseudonym

__all__ = ["Leases", "Progress", "choose_question", "needs_labels", "progress"]

GOLD_SHARE = 0.1
"""At least so many of the questions that a labeller is shown are gold, until they have seen all gold ones."""


@dataclass(frozen=True)
class Progress:
    """Progress of one labeller: current labels, open questions, and those of them on other screens now."""

    done: int
    left: int
    leased_to_others: int


class Leases:
    """Leases: at most one question per labeller, the one on the screen; `lock` guards check-then-acquire."""

    def __init__(self, seconds: float) -> None:
        self.lock = threading.RLock()
        self._seconds = seconds
        self._held: dict[str, tuple[str, float]] = {}

    def acquire(self, labeller: str, question_id: str) -> None:
        """Put the question on the labeller's screen, in place of what is there."""
        with self.lock:
            self._held[labeller] = (question_id, time.monotonic() + self._seconds)

    def release(self, labeller: str, question_id: str) -> None:
        """Take the question from the labeller's screen, if it is the one there."""
        with self.lock:
            if self._held.get(labeller, ("",))[0] == question_id:
                del self._held[labeller]

    def held_by_others(self, labeller: str) -> Counter[str]:
        """Count on how many other screens each question is."""
        return Counter(question for name, question in self.current().items() if name != labeller)

    def current(self) -> dict[str, str]:
        """Map labeller → the question on their screen."""
        with self.lock:
            now = time.monotonic()
            self._held = {name: lease for name, lease in self._held.items() if lease[1] > now}
            return {name: question for name, (question, _) in self._held.items()}


def choose_question(connection: Connection, leases: Leases, labeller: str) -> Question | None:
    """Return the question on the labeller's screen, else an open one by priority, with gold mixed in.

    Where gold comes depends on the labeller's events alone, so it is the same if asked again.
    """
    if leased := _leased_question(connection, leases, labeller):
        return leased
    events = db.count_rows(connection, select(db.EVENT.event_id).where(db.EVENT.labeller == labeller))
    rng = random.Random(f"{labeller}\0{events}")
    gold = [db.to_question(row) for row in connection.execute(_gold_for(labeller))]
    ordinary = _first_available(connection, leases, labeller)
    if not gold or not ordinary:
        return rng.choice(gold) if gold else ordinary
    left = db.count_rows(connection, _open_for(labeller))
    share = max(len(gold) / (len(gold) + left), GOLD_SHARE)
    return rng.choice(gold) if rng.random() < share else ordinary


def progress(connection: Connection, leases: Leases, labeller: str) -> Progress:
    """Return how far the labeller is."""
    done = db.count_rows(connection, select(db.EVENT.event_id).where(db.IS_CURRENT, db.EVENT.labeller == labeller))
    left = sum(db.count_rows(connection, statement(labeller)) for statement in (_open_for, _gold_for))
    others = leases.held_by_others(labeller)
    leased = connection.execute(_open_for(labeller).where(db.QUESTION.id.in_(others)))
    return Progress(done, left, sum(row.labels + others[row.id] >= row.labels_wanted for row in leased))


def needs_labels() -> Select[Any]:
    """Select questions that need labels, gold left out, with the number they have, in the order shown.

    Labels are counted once, in a subquery that is joined: fast with twenty thousand questions, also where the database
    has no statistics of its tables yet.
    """
    people = ~db.EVENT.labeller.startswith(MODEL_PREFIX, autoescape=True)
    counted = select(db.EVENT.question_id, func.count().label("labels")).where(
        db.IS_CURRENT, db.EVENT.choice != "skip", people
    )
    have = counted.group_by(db.EVENT.question_id).subquery()
    number = func.coalesce(have.c.labels, 0)
    questions = select(db.questions, number.label("labels")).outerjoin(have, have.c.question_id == db.QUESTION.id)
    return db.in_order(questions.where(db.QUESTION.gold.is_(None), number < db.QUESTION.labels_wanted))


def _open_for(labeller: str) -> Select[Any]:
    return needs_labels().where(_unanswered(labeller))


def _gold_for(labeller: str) -> Select[Any]:
    return select(db.questions).where(db.QUESTION.gold.is_not(None), _unanswered(labeller)).order_by(db.QUESTION.id)


def _unanswered(labeller: str) -> ColumnElement[bool]:
    own = db.EVENT.labeller.in_([labeller, pseudonym(labeller)])
    return db.QUESTION.id.not_in(select(db.EVENT.question_id).where(db.IS_CURRENT, own))


def _leased_question(connection: Connection, leases: Leases, labeller: str) -> Question | None:
    leased = select(db.questions).where(db.QUESTION.id == leases.current().get(labeller, ""), _unanswered(labeller))
    row = connection.execute(leased).first()
    return db.to_question(row) if row else None


def _first_available(connection: Connection, leases: Leases, labeller: str) -> Question | None:
    others = leases.held_by_others(labeller)
    # Each screen takes one place of one question, so of one row more than there are screens one is free.
    rows = connection.execute(_open_for(labeller).limit(others.total() + 1))
    free = (row for row in rows if row.labels + others[row.id] < row.labels_wanted)
    return next((db.to_question(row) for row in free), None)
