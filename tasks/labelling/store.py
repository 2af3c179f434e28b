"""The repository of questions and labels, which the labelling page and the commands share.

A question is open for a labeller who has not answered it, while fewer than `labels_wanted` people have; a gold question
is open for everybody. A skip is an answer, but does not count for `labels_wanted`, and neither do labels of models
(`model:…`): somebody else is asked.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar
from uuid import uuid4

from sqlalchemy import ColumnElement, Connection, Row, Select, insert, select, update
from sqlalchemy.exc import IntegrityError

from tasks.core.errors import DataError, RLHFError, SourceError
from tasks.labelling import database as db
from tasks.labelling.assignment import Leases, Progress, choose_question, needs_labels, progress
from tasks.labelling.backup import LabelCopy
from tasks.labelling.labels import (
    FLIPPED,
    MAX_NAME_LENGTH,
    MODEL_PREFIX,
    Label,
    Question,
    flip,
    is_model,
    label_error,
    pseudonym,
    question_error,
)

__all__ = ["ConflictError", "ImportResult", "LabelStore", "LabelTask", "SaveResult"]

LEASE_SECONDS = 900.0

NAME = re.compile(r"\w(?:[\w .@+-]{0,62}[\w.])?")

LABEL_VALUE = ("choice", "strength", "rating_a", "rating_b", "comment")
"""What makes two labels of a question the same: not the time they took, nor the order shown."""

CLICK = ("question_id", "labeller", "previous_event", "kind", *LABEL_VALUE)
"""What makes two clicks the same."""

Event: TypeAlias = dict[str, Any]
Result = TypeVar("Result")


class ConflictError(DataError):
    """The click was made on a state that has changed; `standing` is the labeller's current label of the question."""

    def __init__(self, message: str, standing: Label | None) -> None:
        super().__init__(message)
        self.standing = standing


@dataclass(frozen=True)
class LabelTask:
    """A question for one labeller. `previous_event` goes back with the answer; `undone` is a label they took back."""

    question: Question
    previous_event: int
    undone: Label | None


@dataclass(frozen=True)
class SaveResult:
    """A label or undoing that is in the database. `duplicate`: it was there already."""

    event_id: int
    duplicate: bool


@dataclass(frozen=True)
class ImportResult:
    """Numbers of questions and labels of an import, and of the new ones among them.

    `conflicts`: known questions with another gold choice, or wanting another number of labels; they stay as they are.
    """

    questions: int
    new_questions: int
    labels: int = 0
    new_labels: int = 0
    conflicts: int = 0


class LabelStore:
    """The labelling database; safe to use from several threads at once."""

    def __init__(self, url: str, *, lease_seconds: float = LEASE_SECONDS) -> None:
        """Open it, and bring its tables and its copy up to date."""
        file = db.database_file(url)
        self.address = db.redact_url(url)
        self._copy = LabelCopy(file) if file else None
        try:
            self._engine = db.connect(url)
            self._writer = self._engine.execution_options(writes=True)
            if self._copy:
                self._transaction(self._copy.compare)
        except RLHFError:
            self.close()
            raise
        self._leases = Leases(lease_seconds)

    def close(self) -> None:
        """Close its connections."""
        if hasattr(self, "_engine"):
            self._engine.dispose()
        if self._copy:
            self._copy.close()

    def add_labeller(self, name: str, password_hash: str | None = None) -> bool:
        """Add a labeller, or give a known one this password; return whether they are new.

        Raises:
            DataError: no name for a labeller.
        """
        _check_name(name, password_hash)

        def work(connection: Connection) -> bool:
            is_new = _add_labeller(connection, name)
            if password_hash:
                own = update(db.labellers).where(db.labellers.c.name == name)
                connection.execute(own.values(password_hash=password_hash))
            return is_new

        return self._write(work)

    def password_hash(self, labeller: str) -> str | None:
        """Return the hash of a labeller's password; None for a model, and for somebody unknown."""
        rows = self._rows(select(db.labellers).filter_by(name=labeller))
        return rows[0].password_hash if rows else None

    def labellers(self) -> list[str]:
        """Return the names of those who can sign in."""
        return self._names(db.labellers.c.password_hash.is_not(None))

    def add_questions(self, questions: Sequence[Question]) -> ImportResult:
        """Add the questions whose id is new, all or none."""
        return self.import_records([(question, ()) for question in questions])

    def import_records(self, records: Sequence[tuple[Question, Sequence[Label]]]) -> ImportResult:
        """Add questions and their labels where they are new, all or none.

        A label is known where its labeller has recorded just that for the question before, also if they changed their
        mind or took it back since: an older file does not bring old opinions back. A pseudonym of a labeller who is
        known here by name becomes that name. Labels of a question that is stored the other way round are flipped.

        Raises:
            DataError: a question or label cannot be kept, or an id belongs to other texts; nothing was added.
        """
        return self._write(lambda connection: _import_records(connection, records))

    def add_guidelines(self, sha256: str, text: str) -> None:
        """Keep the text of guidelines, once."""

        def work(connection: Connection) -> None:
            if not _exists(connection, db.guidelines.c.sha256 == sha256):
                connection.execute(insert(db.guidelines).values(sha256=sha256, text=text))

        self._write(work)

    def guidelines(self) -> dict[str, str]:
        """Map the sha256 of guidelines that were ever shown to their text."""
        return {row.sha256: row.text for row in self._rows(select(db.guidelines))}

    def questions(self) -> list[Question]:
        """Return all questions in the order in which they are shown."""
        return [db.to_question(row) for row in self._rows(db.in_order(select(db.questions)))]

    def current_labels(self) -> list[Label]:
        """Return each labeller's last label of each question unless it is undone, by question and labeller.

        A pseudonym and the name that it stands for are one labeller, under the name where that is known.
        """
        names = {pseudonym(name): name for name in self._names() if pseudonym(name) != name}
        last: dict[tuple[str, str], Row[Any]] = {}
        for row in self._rows(select(db.events).where(db.EVENT.event_id.in_(db.LAST_IDS)).order_by(db.EVENT.event_id)):
            last[row.question_id, names.get(row.labeller, row.labeller)] = row
        return [
            replace(db.to_label(row), labeller=name) for (_, name), row in sorted(last.items()) if row.kind == "label"
        ]

    def recorded_labels(self, labeller: str) -> list[Label]:
        """Return every label that the labeller ever gave, those that they undid or changed too."""
        return [db.to_label(row) for row in self._rows(select(db.events).filter_by(kind="label", labeller=labeller))]

    def last_label(self, labeller: str) -> Label | None:
        """Return the newest of the labeller's current labels."""
        own = select(db.events).where(db.IS_CURRENT, db.EVENT.labeller == labeller)
        rows = self._rows(own.order_by(db.EVENT.event_id.desc()).limit(1))
        return db.to_label(rows[0]) if rows else None

    def next_task(self, labeller: str) -> LabelTask | None:
        """Return what to ask next; None: nothing is open for them, or all of it is on others' screens."""
        with self._leases.lock, self._reading() as connection:
            question = choose_question(connection, self._leases, labeller)
            if question is None:
                return None
            self._leases.acquire(labeller, question.id)
            last = db.find_event(connection, question_id=question.id, labeller=labeller)
            undone = db.find_event(connection, event_id=last.previous_event) if last else None
            return LabelTask(question, last.event_id if last else 0, db.to_label(undone) if undone else None)

    def save_label(self, label: Label, *, token: str | None = None, previous_event: int | None = None) -> SaveResult:
        """Save a label, also one more than `labels_wanted`; the same one sent twice counts once.

        Args:
            token: made by the page that asked, or by a model's run.
            previous_event: of the LabelTask. None where no page asked: the label follows the labeller's last event, if
                it differs from that, and a labeller who is not known yet is added.

        Raises:
            ConflictError: the labeller has answered the question in the meantime, elsewhere or otherwise.
            DataError: it is no label, or there is no such question or labeller.
        """
        event = _label_event(label, token)
        result = self._write(lambda connection: _save(connection, event, previous_event))
        self._leases.release(label.labeller, label.question_id)
        return result

    def undo(self, labeller: str, *, token: str, event_id: int) -> SaveResult:
        """Take a label back and put its question on the labeller's screen again; sent twice, it counts once.

        Raises:
            ConflictError: the label is not current any more.
            DataError: the labeller has given no such label.
        """
        rows = self._rows(select(db.events).filter_by(event_id=event_id, labeller=labeller, kind="label"))
        if not rows:
            raise DataError(f"{labeller} has given no answer of number {event_id}")
        question_id, swapped = rows[0].question_id, rows[0].swapped
        event = {"kind": "undo", "token": token, "question_id": question_id, "labeller": labeller, "swapped": swapped}
        result = self._write(lambda connection: _save(connection, event, event_id))
        if not result.duplicate:
            self._leases.acquire(labeller, question_id)
        return result

    def progress(self, labeller: str) -> Progress:
        """Return how far the labeller is."""
        with self._reading() as connection:
            return progress(connection, self._leases, labeller)

    def open_questions(self) -> tuple[int, int]:
        """Return how many questions need labels, gold left out, and how many there are, with gold."""
        with self._reading() as connection:
            return db.count_rows(connection, needs_labels()), db.count_rows(connection, select(db.QUESTION.id))

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with db.explained(self.address), self._engine.connect() as connection:
            yield connection

    def _rows(self, statement: Select[Any]) -> Sequence[Row[Any]]:
        with self._reading() as connection:
            return connection.execute(statement).all()

    def _names(self, *where: ColumnElement[bool]) -> list[str]:
        return [row.name for row in self._rows(select(db.labellers.c.name).where(*where).order_by(db.labellers.c.name))]

    def _write(self, work: Callable[[Connection], Result]) -> Result:
        result = self._transaction(work)
        if self._copy:
            self._transaction(self._copy.catch_up)
        return result

    def _transaction(self, work: Callable[[Connection], Result]) -> Result:
        for _ in range(2):  # in PostgreSQL another connection may write between our look and our writing
            with suppress(IntegrityError), db.explained(self.address), self._writer.begin() as connection:
                return work(connection)
        raise SourceError(
            "the labelling database has changed meanwhile, by a click or another command; what was stored before "
            "is kept: run again"
        )


def _label_event(label: Label, token: str | None) -> Event:
    if reason := label_error(label):
        raise DataError(reason)
    content = {name: value for name, value in vars(label).items() if name != "event_id"}
    return content | {"comment": label.comment or None, "kind": "label", "token": token or str(uuid4())}


def _save(connection: Connection, event: Event, previous_event: int | None) -> SaveResult:
    """Add the event unless it is there; without a previous event it follows the last one."""
    question_id, labeller = event["question_id"], event["labeller"]
    if not _exists(connection, db.QUESTION.id == question_id):
        raise DataError(f"no question {question_id!r} is in the database")
    last = db.find_event(connection, question_id=question_id, labeller=labeller)
    sent = db.find_event(connection, token=event["token"])
    last_id = last.event_id if last else 0
    if previous_event is None:
        _add_labeller(connection, labeller)
        if repeated := last if last and _equal(last, event, ("kind", *LABEL_VALUE)) else sent:
            return SaveResult(repeated.event_id, duplicate=True)
    elif not _exists(connection, db.labellers.c.name == labeller):
        raise DataError(f"no labeller {labeller!r} is in the database")
    event = event | {"previous_event": last_id if previous_event is None else previous_event}
    if sent is None and last_id == event["previous_event"]:
        inserted = connection.execute(insert(db.events).values(event)).inserted_primary_key
        return SaveResult(inserted[0] if inserted else 0, duplicate=False)
    if sent is None or not _equal(sent, event, CLICK):
        raise ConflictError(
            f"{labeller} has answered {question_id} in the meantime; nothing was changed",
            db.to_label(last) if last and last.kind == "label" else None,
        )
    return SaveResult(sent.event_id, duplicate=True)


def _equal(row: Row[Any], event: Event, names: Sequence[str]) -> bool:
    return all(getattr(row, name) == event.get(name) for name in names)


def _import_records(connection: Connection, records: Sequence[tuple[Question, Sequence[Label]]]) -> ImportResult:
    known = {row.id: db.to_question(row) for row in connection.execute(select(db.questions))}
    new: dict[str, Question] = {}
    conflicts = 0
    for question, _ in records:
        if question.id in known:
            conflicts += _conflicts(question, known[question.id])
        elif reason := question_error(question):
            raise DataError(
                f"question {question.id}, {question.prompt[:40]!r}: {reason}; nothing was added: leave it out, or let "
                "the policies write other responses with --seed"
            )
        else:
            new.setdefault(question.id, question)
    if new:
        connection.execute(insert(db.questions), [vars(question) for question in new.values()])
    names = {pseudonym(name): name for name in connection.scalars(select(db.labellers.c.name))}
    sides = {name: question.response_a for name, question in (known | new).items()}
    labels = [
        label if sides[question.id] == question.response_a else flip(label)
        for question, own in records
        for label in own
    ]
    named = [replace(label, labeller=names.get(label.labeller, label.labeller)) for label in labels]
    new_labels = sum(_import_label(connection, label) for label in named)
    return ImportResult(len(records), len(new), len(labels), new_labels, conflicts)


def _import_label(connection: Connection, label: Label) -> bool:
    event = _label_event(label, None)
    names = ("question_id", "labeller", "kind", *LABEL_VALUE)
    if _exists(connection, *(db.EVENT[name] == event[name] for name in names)):
        return False
    return not _save(connection, event, None).duplicate


def _conflicts(question: Question, known: Question) -> bool:
    """Return whether a known question has another gold choice, or wants another number of labels."""
    sides, known_sides = ((item.response_a, item.response_b) for item in (question, known))
    if question.prompt != known.prompt or sorted(sides) != sorted(known_sides):
        raise DataError(f"question {question.id!r} is in the database with other texts; give the new one its own id")
    gold = question.gold if sides == known_sides else FLIPPED.get(question.gold or "", question.gold)
    return (gold, question.labels_wanted) != (known.gold, known.labels_wanted)


def _add_labeller(connection: Connection, name: str) -> bool:
    if _exists(connection, db.labellers.c.name == name):
        return False
    connection.execute(insert(db.labellers).values(name=name))
    return True


def _exists(connection: Connection, *where: ColumnElement[bool]) -> bool:
    return connection.execute(select(1).where(*where).limit(1)).first() is not None


def _check_name(name: str, password_hash: str | None) -> None:
    valid = name != MODEL_PREFIX and not password_hash if is_model(name) else NAME.fullmatch(name)
    if len(name) > MAX_NAME_LENGTH or not valid:
        raise DataError(
            f"{name!r} is no name for a labeller: write 1 to {MAX_NAME_LENGTH} letters, digits, spaces and . @ + - _, "
            f"the first a letter or digit; names that begin with {MODEL_PREFIX} are models', and have no password"
        )
