"""Questions and labels as plain rows, and their way into and out of a session of the database."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from sqlalchemy import select
from sqlalchemy.orm import Session

from tasks.core.errors import DataError
from tasks.labelling.answers import NUL, TURNED, comment_flaw
from tasks.labelling.queries import ARGILLA, LABEL_STUDIO, MODEL, PERSON, STANDS, last_event
from tasks.labelling.tables import CHOICES, SIDES, Event, Item, Labeller

__all__ = [
    "LONGEST_NAME",
    "Label",
    "Question",
    "add_label",
    "add_questions",
    "by_model",
    "current_labels",
    "flaw",
    "mirrored",
    "otherwise_known",
    "pseudonym",
    "pseudonyms",
    "question_flaw",
    "question_id",
    "questions",
    "said_before",
]


def _longest(column: Any) -> int:
    return int(column.type.length)


LONGEST_NAME = _longest(Labeller.name)
"""Characters of a labeller's name at most."""

LONGEST = {"policy_a": _longest(Item.policy_a), "policy_b": _longest(Item.policy_b), "reason": _longest(Item.reason)}
"""Characters of a question's short texts at most."""

NAMELESS = re.compile(rf"{MODEL}.*|{PERSON}[0-9a-f]{{12}}|{ARGILLA}[0-9a-f-]{{36}}|{LABEL_STUDIO}\d+", re.DOTALL)
"""Labellers whose name says nothing about a person: models, and those who came under a pseudonym or a number."""


@dataclass(frozen=True)
class Question:
    """Two responses to compare; the fields mean what they mean in `tables.Item`."""

    id: str
    prompt: str
    response_a: str
    response_b: str
    policy_a: str
    policy_b: str
    reason: str
    gold: str | None = None
    priority: float = 0.0
    labels_wanted: int = 1


@dataclass(frozen=True)
class Label:
    """What a labeller thinks of a question; the fields mean what they mean in `tables.Event`."""

    item: str
    labeller: str
    choice: str
    strength: int | None = None
    rating_a: int | None = None
    rating_b: int | None = None
    comment: str | None = None
    swapped: bool = False
    seconds: float | None = None


def question_id(prompt: str, response_a: str, response_b: str) -> str:
    """The same for the same texts, in whichever order the two responses come."""
    content = "\x1f".join([prompt, *sorted((response_a, response_b))])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def by_model(labeller: str) -> bool:
    """Whether the labeller is a model."""
    return labeller.startswith(MODEL)


def pseudonym(labeller: str) -> str:
    """Says which labels are of one person, not of which; who knows the names can recompute it.

    Who has no name keeps what they have (see `NAMELESS`), so that labels that come back are still theirs.
    """
    if NAMELESS.fullmatch(labeller):
        return labeller
    return f"{PERSON}{hashlib.sha256(f'labeller {labeller}'.encode()).hexdigest()[:12]}"


def pseudonyms(labels: Iterable[Label]) -> dict[str, str]:
    """Labeller → pseudonym, for everybody who labelled."""
    return {label.labeller: pseudonym(label.labeller) for label in labels}


def mirrored(label: Label) -> Label:
    """The same opinion where the two responses stand the other way round."""
    content = vars(label) | {"choice": TURNED.get(label.choice, label.choice), "swapped": not label.swapped}
    return Label(**(content | {"rating_a": label.rating_b, "rating_b": label.rating_a}))


def flaw(label: Label) -> str | None:
    """Why the label is none, or None where it is one."""
    if label.choice not in CHOICES:
        return f"choice: {label.choice!r} is none of {', '.join(CHOICES)}"
    if label.strength is not None and not (label.choice in SIDES and label.strength in (1, 2, 3)):
        return f"strength: {label.strength} with {label.choice!r}; it is 1, 2 or 3, and for a and b only"
    ratings = (label.rating_a, label.rating_b)
    if any(rating is not None and rating not in range(1, 6) for rating in ratings):
        return f"rating: {ratings} should be from 1 to 5"
    if not 0 < len(label.labeller) <= LONGEST_NAME or "\0" in label.labeller:
        return f"labeller: {label.labeller!r} should have 1 to {LONGEST_NAME} characters, none of them NUL"
    return comment_flaw(label.comment)


def question_flaw(question: Question) -> str | None:
    """Why the question cannot be kept, or None where it can."""
    for name in ("prompt", "response_a", "response_b"):
        if "\0" in getattr(question, name):
            return f"{name}: {NUL}"
    for name, most in LONGEST.items():
        if (length := len(getattr(question, name))) > most:
            return f"{name}: {length} characters, at most {most} are kept"
    return None


def questions(session: Session) -> list[Question]:
    """All questions, those of higher priority first, otherwise by id."""
    items = session.scalars(select(Item).order_by(Item.priority.desc(), Item.id))
    return [Question(**{name: getattr(item, name) for name in Question.__dataclass_fields__}) for item in items]


def add_questions(session: Session, asked: Sequence[Question]) -> int:
    """Add those that are not there yet, and say how many that were.

    Raises:
        DataError: one cannot be kept, see `question_flaw`; nothing was added.
    """
    wrong = next((question for question in asked if question_flaw(question)), None)
    if wrong:
        raise DataError(
            f"question {wrong.id}, {wrong.prompt[:40]!r}: {question_flaw(wrong)}; nothing was added: leave it out, or "
            "let the policies write other responses with --seed"
        )
    known = set(session.scalars(select(Item.id)))
    new = {question.id: question for question in asked if question.id not in known}
    session.add_all(Item(**vars(question)) for question in new.values())
    session.flush()
    return len(new)


def otherwise_known(session: Session, asked: Sequence[Question]) -> int:
    """How many are in the database with another known answer, or wanting another number of labels.

    They stay as they are, see `add_questions`: people may have been asked already.
    """
    known = {question.id: question for question in questions(session)}
    return sum(_differs(question, known[question.id]) for question in asked if question.id in known)


def _differs(question: Question, known: Question) -> bool:
    turned = question.response_a != known.response_a
    gold = TURNED.get(question.gold or "") if turned else question.gold
    return (gold, question.labels_wanted) != (known.gold, known.labels_wanted)


def current_labels(session: Session) -> list[Label]:
    """What each labeller thinks of each question now: their last event on it, where that is no undoing.

    Ordered by question and labeller.
    """
    standing = select(Event).where(STANDS).order_by(Event.item_id, Event.labeller)
    return [_label(event) for event in session.scalars(standing)]


def add_label(session: Session, label: Label, token: str | None = None) -> bool:
    """Add the event unless the labeller thinks that already, or an event of that token is there; whether it was new."""
    if token is not None and session.scalar(select(Event.id).where(Event.token == token)):
        return False
    before = session.scalar(last_event(label.item, label.labeller))
    if before is not None and before.kind == "label" and _opinion(_label(before)) == _opinion(label):
        return False
    if session.get(Labeller, label.labeller) is None:
        session.add(Labeller(name=label.labeller))
        session.flush()  # before the event that refers to it
    after = before.id if before else 0
    content = {name: value for name, value in vars(label).items() if name != "item"}
    token = token or str(uuid5(NAMESPACE_URL, f"{label.item} {label.labeller} {after} {_opinion(label)}"))
    session.add(Event(token=token, item_id=label.item, after=after, kind="label", **content))
    session.flush()
    return True


def said_before(session: Session, label: Label) -> bool:
    """Whether the labeller has ever said that of the question; it may be undone, or no longer what they think."""
    own = select(Event).where(Event.item_id == label.item, Event.labeller == label.labeller, Event.kind == "label")
    return any(_opinion(_label(event)) == _opinion(label) for event in session.scalars(own))


def _label(event: Event) -> Label:
    content: Mapping[str, object] = {
        name: getattr(event, name) for name in Label.__dataclass_fields__ if name != "item"
    }
    return Label(item=event.item_id, **content)  # type: ignore[arg-type]


def _opinion(label: Label) -> tuple[object, ...]:
    return (label.choice, label.strength, label.rating_a, label.rating_b, label.comment or None)
