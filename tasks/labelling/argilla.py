"""Records as Argilla 2 reads them from disk (`Record.from_dict`), and writes them (`dataset.records.to_json`).

Fields are prompt, response_a and response_b; questions are preference (labels a, b, tie, both_bad), strength (1 to 3),
rating_a and rating_b (1 to 5) and comment. Argilla knows labellers by a UUID; the metadata `labellers` names
them, `swapped` holds the UUIDs of those who saw response_b first, and the rest of the metadata is what we know of the
question (`records.facts`). How long a label took has no place in a record.

A response that we write says in `status` whether it was submitted or discarded. Argilla's own writer (2.8,
`Record.to_dict`) drops that, so drafts and discarded answers come out as submitted ones; see `without_status`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from tasks.labelling.labels import Label, Question
from tasks.labelling.queries import ARGILLA
from tasks.labelling.records import facts, number, question, value, values

__all__ = ["parsed", "record", "without_status"]

OWN = re.compile(ARGILLA + "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

ASKED = ("preference", "strength", "rating_a", "rating_b", "comment")


def record(asked: Question, labels: Sequence[Label]) -> dict[str, Any]:
    """A question with its labels; a skip is a discarded response."""
    answers: dict[str, list[dict[str, Any]]] = {}
    for label in labels:
        for name, answer in _answers(label).items():
            status = "discarded" if label.choice == "skip" else "submitted"
            response = {"value": answer, "user_id": _user(label.labeller), "status": status}
            answers.setdefault(name, []).append(response)
    metadata = {name: fact for name, fact in facts(asked).items() if fact != ""}
    if labels:
        metadata["labellers"] = [f"{_user(label.labeller)} {label.labeller}" for label in labels]
        metadata["swapped"] = [_user(label.labeller) for label in labels if label.swapped]
    fields = {"prompt": asked.prompt, "response_a": asked.response_a, "response_b": asked.response_b}
    return {"id": asked.id, "fields": fields, "metadata": metadata, "suggestions": {}, "responses": answers,
            "vectors": {}, "status": "completed" if labels else "pending"}  # fmt: skip


def parsed(content: Any) -> tuple[Question, list[Label]]:
    """A question and its labels; what says that it is a draft is none.

    Raises:
        ValueError: it is no such record; with the reason.
    """
    fields, metadata = value(content, "fields", dict), value(content, "metadata", dict, {})
    asked = question(fields, metadata, "prompt", "response_a", "response_b")
    names = dict(line.split(" ", 1) for line in values(metadata, "labellers", str) if " " in line)
    swapped = values(metadata, "swapped", str)
    responses = value(content, "responses", dict, {})
    given: dict[str, dict[str, Any]] = {}
    for name in ASKED:
        for response in values(responses, name, dict):
            user = _uuid(value(response, "user_id", str))
            if response.get("status") != "draft":
                given.setdefault(user, {})[name] = _answer(name, response)
    labels = [_label(asked.id, names.get(user, f"{ARGILLA}{user}"), own) for user, own in given.items()]
    return asked, [replace(label, swapped=user in swapped) for user, label in zip(given, labels, strict=True)]


def without_status(content: dict[str, Any]) -> bool:
    """Whether a record that was read has a response that does not say whether it was submitted."""
    responses = content.get("responses") or {}
    return any("status" not in response for name in ASKED for response in responses.get(name) or ())


def _answers(label: Label) -> dict[str, Any]:
    choice = None if label.choice == "skip" else label.choice
    rest = {name: getattr(label, name) for name in ASKED[1:]}
    return {"preference": choice} | {name: answer for name, answer in rest.items() if answer is not None}


def _answer(name: str, response: dict[str, Any]) -> Any:
    """A preference that was discarded, or of which no value was kept, is a skip."""
    if name != "preference":
        return response.get("value")
    return "skip" if response.get("status") == "discarded" or response.get("value") is None else response["value"]


def _label(item: str, labeller: str, own: dict[str, Any]) -> Label:
    if "preference" not in own:
        raise ValueError(f"responses: {labeller} has answered {', '.join(own)}, and not preference")
    strength, rating_a, rating_b = (number(own.get(name), name) for name in ASKED[1:4])
    comment = None if own.get("comment") is None else value(own, "comment", str)
    return Label(item, labeller, value(own, "preference", str), strength, rating_a, rating_b, comment)


def _user(labeller: str) -> str:
    """Argilla's own UUID where the label came from there."""
    if OWN.fullmatch(labeller):
        return labeller.removeprefix(ARGILLA)
    return str(uuid5(NAMESPACE_URL, f"labeller:{labeller}"))


def _uuid(text: str) -> str:
    try:
        return str(UUID(text))
    except ValueError:
        raise ValueError(f"user_id: {text!r} is no UUID") from None
