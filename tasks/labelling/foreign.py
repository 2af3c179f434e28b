"""Questions and labels in the formats of Argilla 2 and Label Studio, both ways.

A file is read as a whole before anything is kept, and each flaw is reported with its line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from sqlalchemy import select
from sqlalchemy.orm import Session

from tasks.core.errors import DataError
from tasks.labelling import argilla, label_studio
from tasks.labelling.labels import (
    Label,
    Question,
    add_label,
    add_questions,
    flaw,
    mirrored,
    otherwise_known,
    pseudonym,
    question_flaw,
    question_id,
    questions,
    said_before,
)
from tasks.labelling.tables import Labeller

__all__ = ["FORMATS", "Format", "Imported", "read", "store", "text_of"]

Format: TypeAlias = Literal["argilla", "label-studio"]

Parsed: TypeAlias = tuple[Question, list[Label]]

FORMATS: Mapping[str, tuple[Callable[[Question, Sequence[Label]], dict[str, Any]], Callable[[Any], Parsed]]] = {
    "argilla": (argilla.record, argilla.parsed),
    "label-studio": (label_studio.task, label_studio.parsed),
}
"""Format → (a question and its labels → a record; a record → a question and its labels, or ValueError)."""

SHOWN = 5

NO_STATUS = "drafts and discarded answers cannot be told from submitted ones; export submitted responses only"


@dataclass(frozen=True)
class Imported:
    """How many questions and labels a file held, and how many of them were new; the others were known, see `store`.

    `kept`: of the known questions, see `labels.otherwise_known`.
    """

    questions: int
    new_questions: int
    labels: int
    new_labels: int
    kept: int = 0


def text_of(asked: Sequence[Question], labels: Sequence[Label], names: Mapping[str, str], kind: Format) -> str:
    """The file: a JSON list, a record a line.

    Args:
        names: labeller → the name that stands in the file.
    """
    of: dict[str, list[Label]] = {}
    for label in labels:
        of.setdefault(label.item, []).append(replace(label, labeller=names[label.labeller]))
    write, _ = FORMATS[kind]
    records = (write(question, of.get(question.id, [])) for question in sorted(asked, key=lambda item: item.id))
    return "[\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n]\n"


def read(path: Path, kind: Format, *, warn: Callable[[str], None] = lambda _: None) -> list[Parsed]:
    """The questions and labels in a file: a JSON list, or an object a line.

    Args:
        warn: is told what in the file cannot be told apart.

    Raises:
        DataError: the file is missing, or something in it is no record; with every line and reason, up to five.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist: give the file that {kind} exported")
    _, parse = FORMATS[kind]
    found: list[Parsed] = []
    flaws: list[str] = []
    doubtful = 0
    for line, record in _records(path.read_text(encoding="utf-8-sig")):
        try:
            if isinstance(record, ValueError):
                raise record
            found.append(_checked(*parse(record)))
            doubtful += kind == "argilla" and argilla.without_status(record)
        except ValueError as error:
            flaws.append(f"  {path}:{line}: {error}")
    if flaws:
        shown = "\n".join(flaws[:SHOWN])
        raise DataError(
            f"{len(flaws)} of {len(found) + len(flaws)} records are malformed; nothing was imported:\n{shown}"
        )
    if doubtful:
        warn(f"{doubtful} of {len(found)} records have responses without a status: {NO_STATUS}")
    return found


def store(session: Session, found: Sequence[Parsed]) -> Imported:
    """Add what is not there yet.

    A label is known where its labeller has said just that of the question before, also if they changed their mind or
    took it back since: an older file does not bring old opinions back. Who stands in the file under a pseudonym and is
    a labeller here by name gets that name.
    """
    names = list(session.scalars(select(Labeller.name)))
    known = {pseudonym(name): name for name in names} | {name: name for name in names}
    asked = [question for question, _ in found]
    kept, new_questions = otherwise_known(session, asked), add_questions(session, asked)
    sides = {question.id: question.response_a for question in questions(session)}
    labels = new_labels = 0
    for question, own in found:
        for label in own:
            named = replace(label, labeller=known.get(label.labeller, label.labeller))
            stored = named if sides[question.id] == question.response_a else mirrored(named)
            new_labels += not said_before(session, stored) and add_label(session, stored)
            labels += 1
    return Imported(len(found), new_questions, labels, new_labels, kept)


def _records(text: str) -> Iterator[tuple[int, Any]]:
    """(line, record), a ValueError in place of one that is no JSON; nothing is read after it in a list."""
    if not text.lstrip().startswith("["):
        lines = enumerate(text.split("\n"), start=1)  # a text may hold other line ends, as U+2028
        yield from ((number, _json(content)) for number, content in lines if content.strip())
        return
    decoder, place = json.JSONDecoder(), text.index("[") + 1
    while (place := _next(text, place)) < len(text) and text[place] != "]":
        line = text.count("\n", 0, place) + 1
        try:
            record, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            yield error.lineno, ValueError(f"not JSON: {error.msg}")
            return
        yield line, record
    if place >= len(text):
        yield text.count("\n") + 1, ValueError("the list has no end: the file was cut")


def _next(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n,":
        place += 1
    return place


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON: {error.msg} at column {error.colno}")


def _checked(question: Question, labels: list[Label]) -> Parsed:
    if question.response_a == question.response_b:
        raise ValueError("the two responses are the same text")
    if not (question.response_a and question.response_b) and question.gold is None:
        raise ValueError("a response is empty, so no preference could come of it: leave the record out")
    if question.id != question_id(question.prompt, question.response_a, question.response_b):
        raise ValueError("its id does not fit its texts: leave the id out, or restore the texts")
    wrong = question_flaw(question) or next((reason for label in labels if (reason := flaw(label))), None)
    if wrong:
        raise ValueError(wrong)
    if len({label.labeller for label in labels}) < len(labels):
        raise ValueError("a labeller has two labels of it")
    return question, labels
