"""Files of Argilla 2 and Label Studio, both ways: read as a whole before anything is kept, errors with their lines."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tasks.core.errors import DataError
from tasks.core.rows import format_json_error
from tasks.labelling.labels import Label, Question, label_error, question_error, question_id
from tasks.labelling.records import argilla_record, label_studio_record, read_argilla, read_label_studio, without_status

__all__ = ["FORMATS", "Format", "Record", "dump", "load", "read_text"]

Format: TypeAlias = Literal["argilla", "label-studio"]

Record: TypeAlias = tuple[Question, list[Label]]

FORMATS: Mapping[str, tuple[Callable[[Question, Sequence[Label]], dict[str, Any]], Callable[[Any], Record]]] = {
    "argilla": (argilla_record, read_argilla),
    "label-studio": (label_studio_record, read_label_studio),
}
"""Format → (a question and its labels → a record; a record → a question and its labels, or ValueError)."""

MAX_LISTED_ERRORS = 5

NO_SEPARATOR = re.compile(r"[^ \t\r\n,]")
"""Where the next record of a list begins, or the list ends."""

NO_STATUS = "drafts and discarded answers cannot be distinguished from submitted ones; export submitted responses only"


def dump(questions: Sequence[Question], labels: Sequence[Label], kind: Format) -> str:
    """Return the file's text: a JSON list, a record a line."""
    by_question: dict[str, list[Label]] = defaultdict(list)
    for label in labels:
        by_question[label.question_id].append(label)
    to_record, _ = FORMATS[kind]
    in_order = sorted(questions, key=lambda question: question.id)
    records = (to_record(question, by_question[question.id]) for question in in_order)
    return "[\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n]\n"


def load(path: Path, kind: Format, *, warn: Callable[[str], None] = lambda _: None) -> list[Record]:
    """Read the questions and labels in a file: a JSON list, or an object a line.

    Args:
        warn: called with what the file leaves open.

    Raises:
        DataError: the file is missing, or something in it is no record; with every line and reason, up to five.
    """
    _, from_record = FORMATS[kind]
    loaded: list[Record] = []
    errors: list[str] = []
    unclear = 0
    for line, record in _records(read_text(path)):
        try:
            if isinstance(record, ValueError):
                raise record
            loaded.append(_validate_record(*from_record(record)))
            unclear += kind == "argilla" and without_status(record)
        except ValueError as error:
            errors.append(f"  {path}:{line}: {error}")
    if errors:
        count, listed = len(loaded) + len(errors), "\n".join(errors[:MAX_LISTED_ERRORS])
        raise DataError(f"{len(errors)} of {count} records are malformed; nothing was imported:\n{listed}")
    if unclear:
        warn(f"{unclear} of {len(loaded)} records have responses without a status: {NO_STATUS}")
    return loaded


def read_text(path: Path, *, exact: bool = False) -> str:
    """Return the text of a file that a person named; exact: with its byte order mark and line ends.

    Raises:
        DataError: it is missing, cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode() if exact else path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start + 1}); save it as UTF-8") from None
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: check the name") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _records(text: str) -> Iterator[tuple[int, Any]]:
    """Yield (line, record), a ValueError in place of one that is no JSON; nothing is read after it in a list."""
    if not text.lstrip().startswith("["):
        lines = enumerate(text.split("\n"), start=1)  # a text may hold other line ends, as U+2028
        yield from ((number, _json(content)) for number, content in lines if content.strip())
        return
    decoder, place = json.JSONDecoder(), text.index("[") + 1
    while (start := NO_SEPARATOR.search(text, place)) and start[0] != "]":
        line = text.count("\n", 0, start.start()) + 1
        try:
            record, place = decoder.raw_decode(text, start.start())
        except json.JSONDecodeError as error:
            yield error.lineno, ValueError(f"not JSON: {error.msg}")
            return
        except (ValueError, RecursionError) as error:
            yield line, ValueError(format_json_error(error))
            return
        yield line, record
    if start is None:
        yield text.count("\n") + 1, ValueError("the list has no end: the file was cut")


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(format_json_error(error))


def _validate_record(question: Question, labels: list[Label]) -> Record:
    if question.response_a == question.response_b:
        raise ValueError("the two responses are the same text")
    if not (question.response_a and question.response_b) and question.gold is None:
        raise ValueError("a response is empty, so no preference could come of it: leave the record out")
    if question.id != question_id(question.prompt, question.response_a, question.response_b):
        raise ValueError("its id does not fit its texts: leave the id out, or restore the texts")
    if reason := question_error(question) or next(filter(None, map(label_error, labels)), None):
        raise ValueError(reason)
    if len({label.labeller for label in labels}) < len(labels):
        raise ValueError("a labeller has two labels of it")
    return question, labels
