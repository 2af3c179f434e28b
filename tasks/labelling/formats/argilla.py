"""Records as Argilla 2 reads them from disk (`Record.from_dict`), and writes them (`dataset.records.to_json`).

Fields are prompt, response_a and response_b; questions are preference (labels a, b, tie, both_bad), strength (1 to 3),
rating_a and rating_b (1 to 5) and comment. Argilla knows labellers by a UUID; the metadata `labellers` names
them, `swapped` holds the UUIDs of those who saw response_b first, and the rest of the metadata is what we know of the
question (`fields.question_metadata`). How long a label took has no place in a record.

A response that we write has the `status` submitted or discarded. Argilla's own writer (2.8, `Record.to_dict`) drops
that, so drafts and discarded answers come out as submitted ones; see `without_status`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from tasks.labelling.formats.fields import get, get_list, optional_int, parse_question, question_metadata
from tasks.labelling.labels import ARGILLA_PREFIX, Label, Question

__all__ = ["from_record", "to_record", "without_status"]

ARGILLA_LABELLER = re.compile(ARGILLA_PREFIX + "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

TEXTS = ("prompt", "response_a", "response_b")
NUMBERS = ("strength", "rating_a", "rating_b")
QUESTIONS = ("preference", *NUMBERS, "comment")


def to_record(question: Question, labels: Sequence[Label]) -> dict[str, Any]:
    """Return a question with its labels; a skip is a discarded response."""
    responses: dict[str, list[dict[str, Any]]] = {}
    for label in labels:
        skip = label.choice == "skip"
        for name in QUESTIONS:
            value = (None if skip else label.choice) if name == "preference" else getattr(label, name)
            if value is not None or name == "preference":
                status = "discarded" if skip else "submitted"
                response = {"value": value, "user_id": _user_id(label.labeller), "status": status}
                responses.setdefault(name, []).append(response)
    metadata = {name: value for name, value in question_metadata(question).items() if value != ""}
    if labels:
        metadata["labellers"] = [f"{_user_id(label.labeller)} {label.labeller}" for label in labels]
        metadata["swapped"] = [_user_id(label.labeller) for label in labels if label.swapped]
    fields = {name: getattr(question, name) for name in TEXTS}
    return {"id": question.id, "fields": fields, "metadata": metadata, "suggestions": {}, "responses": responses,
            "vectors": {}, "status": "completed" if labels else "pending"}  # fmt: skip


def from_record(record: Any) -> tuple[Question, list[Label]]:
    """Return a question and its labels; drafts are left out.

    Raises:
        ValueError: it is no such record; with the reason.
    """
    fields, metadata = get(record, "fields", dict), get(record, "metadata", dict, {})
    question = parse_question(fields, metadata, *TEXTS)
    names = dict(line.split(" ", 1) for line in get_list(metadata, "labellers", str) if " " in line)
    swapped = get_list(metadata, "swapped", str)
    responses = get(record, "responses", dict, {})
    by_user: dict[str, dict[str, Any]] = {}
    for name in QUESTIONS:
        for response in get_list(responses, name, dict):
            user = _uuid(get(response, "user_id", str))
            if response.get("status") != "draft":
                by_user.setdefault(user, {})[name] = _value(name, response)
    labellers = {user: names.get(user, f"{ARGILLA_PREFIX}{user}") for user in by_user}
    return question, [_label(question.id, labellers[user], values, user in swapped) for user, values in by_user.items()]


def without_status(record: dict[str, Any]) -> bool:
    """Return whether a record that was read has a response without the status draft, submitted or discarded."""
    responses = record.get("responses") or {}
    return any("status" not in response for name in QUESTIONS for response in responses.get(name) or ())


def _value(name: str, response: dict[str, Any]) -> Any:
    """Return a response's value; a preference that was discarded, or of which no value was kept, is a skip."""
    value = response.get("value")
    if name == "preference" and (response.get("status") == "discarded" or value is None):
        return "skip"
    return value


def _label(question_id: str, labeller: str, values: dict[str, Any], swapped: bool) -> Label:
    if "preference" not in values:
        raise ValueError(f"responses: {labeller} has answered {', '.join(values)}, and not preference")
    strength, rating_a, rating_b = (optional_int(values.get(name), name) for name in NUMBERS)
    comment = None if values.get("comment") is None else get(values, "comment", str)
    choice = get(values, "preference", str)
    return Label(question_id, labeller, choice, strength, rating_a, rating_b, comment, swapped)


def _user_id(labeller: str) -> str:
    """Return Argilla's own UUID where the label came from there."""
    if ARGILLA_LABELLER.fullmatch(labeller):
        return labeller.removeprefix(ARGILLA_PREFIX)
    return str(uuid5(NAMESPACE_URL, f"labeller:{labeller}"))


def _uuid(text: str) -> str:
    try:
        return str(UUID(text))
    except ValueError:
        raise ValueError(f"user_id: {text!r} is no UUID") from None
