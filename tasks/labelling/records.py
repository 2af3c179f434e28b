"""Records of Argilla 2 and of Label Studio, both ways; what is missing or of another type is a ValueError.

Both hold what we know of the question, see `_question_metadata`.

Argilla reads records from disk by `Record.from_dict`, and writes them by `dataset.records.to_json`. Fields are prompt,
response_a and response_b; questions are preference (labels a, b, tie, both_bad), strength (1 to 3), rating_a and
rating_b (1 to 5) and comment. Labellers have a UUID; the metadata `labellers` names them, `swapped` holds the
UUIDs of those who saw response_b first, and `guidelines` those of who were shown guidelines, with their sha256. A
response that we write has the `status` submitted or discarded. Argilla's own writer (2.8, `Record.to_dict`) drops that,
so drafts and discarded answers come out as submitted ones; see `without_status`. How long a label took has no place in
a record.

Label Studio's tasks are for the interface `LABEL_STUDIO_CONFIG`. People's labels are annotations, models' are
predictions. It refuses an annotation of an e-mail address that it does not know, and has no field for another name: so
ours stands in the id of each part of an annotation's result, as `<labeller>/<part>`, which Label Studio keeps; a result
without parts gets an empty comment for it. The data hold the texts, in `swapped` who saw answer2 first, and in
`guidelines` the sha256 of what each labeller was shown.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from tasks.labelling.labels import (
    ARGILLA_PREFIX,
    LABEL_STUDIO_PREFIX,
    MODEL_PREFIX,
    VALUED_CHOICES,
    Label,
    Question,
    is_model,
    question_id,
)

__all__ = [
    "LABEL_STUDIO_CONFIG", "argilla_record", "label_studio_record", "read_argilla", "read_label_studio",
    "without_status",
]  # fmt: skip

ARGILLA_LABELLER = re.compile(ARGILLA_PREFIX + "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

LABEL_STUDIO_CONFIG = (Path(__file__).parent / "label_studio.xml").read_text(encoding="utf-8")
"""The labelling interface: choose one of two, tie or both bad; a skipped task is a skip."""

SIDES = {"a": "left", "b": "right"}
RATINGS = {"strength": "prompt", "rating_a": "answer1", "rating_b": "answer2"}
"""Rating → the text of Label Studio's interface that it stands at."""

TEXTS = ("prompt", "response_a", "response_b")
QUESTIONS = ("preference", *RATINGS, "comment")

MAX_LABELS_WANTED = 1000
"""Of one question; more are a mistake, and a database's integers have an end."""


def argilla_record(question: Question, labels: Sequence[Label]) -> dict[str, Any]:
    """Return a question with its labels; a skip is a discarded response."""
    responses: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for label in labels:
        skip = label.choice == "skip"
        own = {"user_id": _uuid_of(label.labeller), "status": "discarded" if skip else "submitted"}
        responses["preference"].append({"value": None if skip else label.choice} | own)
        for name in QUESTIONS[1:]:
            if (value := getattr(label, name)) is not None:
                responses[name].append({"value": value} | own)
    metadata = {name: value for name, value in _question_metadata(question).items() if value != ""}
    if labels:
        metadata["labellers"] = [f"{_uuid_of(label.labeller)} {label.labeller}" for label in labels]
        metadata["swapped"] = [_uuid_of(label.labeller) for label in labels if label.swapped]
        shown = [f"{_uuid_of(label.labeller)} {label.guidelines}" for label in labels if label.guidelines]
        metadata |= {"guidelines": shown} if shown else {}
    fields = {name: getattr(question, name) for name in TEXTS}
    return {"id": question.id, "fields": fields, "metadata": metadata, "suggestions": {}, "responses": responses,
            "vectors": {}, "status": "completed" if labels else "pending"}  # fmt: skip


def read_argilla(record: Any) -> tuple[Question, list[Label]]:
    """Return a question and its labels; drafts are left out, discarded preferences and those without a value are skips.

    Raises:
        ValueError: it is no such record; with the reason.
    """
    fields, metadata = _get(record, "fields", dict), _get(record, "metadata", dict, {})
    question = _parse_question(fields, metadata, *TEXTS)
    names = dict(line.split(" ", 1) for line in _get_list(metadata, "labellers", str) if " " in line)
    swapped = _get_list(metadata, "swapped", str)
    shown = dict(line.split(" ", 1) for line in _get_list(metadata, "guidelines", str) if " " in line)
    responses = _get(record, "responses", dict, {})
    by_user: dict[str, dict[str, Any]] = defaultdict(dict)
    for name in QUESTIONS:
        for response in _get_list(responses, name, dict):
            user, value, status = _parse_uuid(response), response.get("value"), response.get("status")
            if name == "preference" and (status == "discarded" or value is None):
                value = "skip"
            if status != "draft":
                by_user[user][name] = value
    labels = [
        _argilla_label(
            question.id, names.get(user, f"{ARGILLA_PREFIX}{user}"), values, user in swapped, shown.get(user)
        )
        for user, values in by_user.items()
    ]
    return question, labels


def without_status(record: dict[str, Any]) -> bool:
    """Return whether a record that was read has a response without the status draft, submitted or discarded."""
    responses = record.get("responses") or {}
    return any("status" not in response for name in QUESTIONS for response in responses.get(name) or ())


def _argilla_label(
    question_id: str, labeller: str, values: dict[str, Any], swapped: bool, guidelines: str | None
) -> Label:
    if "preference" not in values:
        raise ValueError(f"responses: {labeller} has answered {', '.join(values)}, and not preference")
    strength, rating_a, rating_b = (_optional_int(values.get(name), name) for name in RATINGS)
    comment = None if values.get("comment") is None else _get(values, "comment", str)
    choice = _get(values, "preference", str)
    return Label(question_id, labeller, choice, strength, rating_a, rating_b, comment, swapped, guidelines=guidelines)


def _uuid_of(labeller: str) -> str:
    """Return Argilla's own UUID where the label came from there."""
    if ARGILLA_LABELLER.fullmatch(labeller):
        return labeller.removeprefix(ARGILLA_PREFIX)
    return str(uuid5(NAMESPACE_URL, f"labeller:{labeller}"))


def _parse_uuid(response: dict[str, Any]) -> str:
    text = _get(response, "user_id", str)
    try:
        return str(UUID(text))
    except ValueError:
        raise ValueError(f"user_id: {text!r} is no UUID") from None


def label_studio_record(question: Question, labels: Sequence[Label]) -> dict[str, Any]:
    """Return a question with its labels."""
    data: dict[str, Any] = {"prompt": question.prompt, "answer1": question.response_a, "answer2": question.response_b}
    data |= _question_metadata(question) | {"swapped": [label.labeller for label in labels if label.swapped]}
    if shown := {label.labeller: label.guidelines for label in labels if label.guidelines}:
        data["guidelines"] = shown
    models = [label for label in labels if is_model(label.labeller)]
    annotations = [_studio_annotation(label) for label in labels if label not in models]
    predictions = [
        {"model_version": label.labeller.removeprefix(MODEL_PREFIX), "result": _studio_result(label)}
        for label in models
    ]
    return {"data": data, "annotations": annotations, "predictions": predictions}


def read_label_studio(record: Any) -> tuple[Question, list[Label]]:
    """Return a question and its labels.

    Raises:
        ValueError: it is no such task; with the reason.
    """
    data = _get(record, "data", dict)
    question = _parse_question(data, data, "prompt", "answer1", "answer2")
    swapped = _get_list(data, "swapped", str)
    given = [(_studio_labeller(own), own) for own in _get(record, "annotations", list, [])]
    given += [(MODEL_PREFIX + _get(own, "model_version", str), own) for own in _get(record, "predictions", list, [])]
    shown = _get(data, "guidelines", dict, {})
    return question, [_studio_label(question.id, name, own, name in swapped, shown.get(name)) for name, own in given]


def _studio_annotation(label: Label) -> dict[str, Any]:
    """Name in `completed_by` only people that Label Studio can know: by e-mail address, or the number that it gave."""
    number = label.labeller.removeprefix(LABEL_STUDIO_PREFIX)
    known: dict[str, Any] = {"completed_by": {"email": label.labeller}} if "@" in label.labeller else {}
    if number != label.labeller and number.isdecimal():
        known = {"completed_by": int(number)}
    content = {"was_cancelled": label.choice == "skip", "lead_time": label.seconds, "result": _studio_result(label)}
    return known | content


def _studio_result(label: Label) -> list[dict[str, Any]]:
    parts: list[tuple[str, str, str, dict[str, Any]]] = []
    if label.choice in SIDES:
        parts.append(("preference", "preference", "pairwise", {"selected": SIDES[label.choice]}))
    elif label.choice != "skip":
        parts.append(("alike", "prompt", "choices", {"choices": [label.choice]}))
    for name, to in RATINGS.items():
        if (rating := getattr(label, name)) is not None:
            parts.append((name, to, "rating", {"rating": rating}))
    if label.comment or not parts:
        parts.append(("comment", "prompt", "textarea", {"text": [label.comment] if label.comment else []}))
    # A prediction may become the start of a person's annotation, which must not carry the model's name.
    owner = "" if is_model(label.labeller) else f"{label.labeller}/"
    return [
        {"id": f"{owner}{name}", "from_name": name, "to_name": to, "type": kind, "value": content}
        for name, to, kind, content in parts
    ]


def _studio_labeller(annotation: dict[str, Any]) -> str:
    """Return our name where it stands in a part's id, else Label Studio's e-mail address or number."""
    for part in _get(annotation, "result", list, []):
        name, slash, rest = str(_get(part, "id", object, "")).rpartition("/")
        if slash and rest == part.get("from_name"):
            return name
    user = annotation.get("completed_by")
    if isinstance(user, dict):
        return str(_get(user, "email", str))
    if not isinstance(user, int):
        raise ValueError(f"completed_by: a number or an object with an email expected, got {str(user)[:80]!r}")
    return f"{LABEL_STUDIO_PREFIX}{user}"


def _studio_label(question_id: str, labeller: str, own: Any, swapped: bool, guidelines: str | None) -> Label:
    parts = {_get(part, "from_name", str): _get(part, "value", dict) for part in _get(own, "result", list, [])}
    strength, rating_a, rating_b = (_optional_int(parts.get(name, {}).get("rating"), name) for name in RATINGS)
    comment = "\n".join(map(str, _get(parts.get("comment", {}), "text", list, []))) or None
    seconds = _optional_float(own.get("lead_time"), "lead_time")
    choice = _studio_choice(own, parts)
    return Label(question_id, labeller, choice, strength, rating_a, rating_b, comment, swapped, seconds, guidelines)


def _studio_choice(own: dict[str, Any], parts: dict[str, dict[str, Any]]) -> str:
    """Return the selected side, or one of tie and both_bad, never both; a model's result with neither is a skip."""
    if own.get("was_cancelled"):
        return "skip"
    selected = parts.get("preference", {}).get("selected")
    alike = _get(parts.get("alike", {}), "choices", list, [])
    if (selected is not None) + len(alike) != 1:
        if "model_version" in own:
            return "skip"
        raise ValueError(f"result: either a side or one of tie and both_bad expected, got {selected!r} and {alike}")
    if selected is None:
        return str(alike[0])
    if selected not in SIDES.values():
        raise ValueError(f"result: selected is {selected!r}, and should be left or right")
    return "a" if selected == "left" else "b"


def _get(record: Any, key: str, kind: type[Any], default: Any = None) -> Any:
    """Return a value of that type; the default where it is missing or null, unless that is None, too."""
    if not isinstance(record, dict):
        raise ValueError(f"not an object but {type(record).__name__}")
    found = record.get(key)
    found = default if found is None else found
    if not isinstance(found, kind):
        raise ValueError(f"{key}: {kind.__name__} expected, got {str(found)[:80]!r}")
    return found


def _get_list(record: Any, key: str, kind: type[Any]) -> list[Any]:
    """Return a list of values of that type, empty where the key is missing."""
    found = _get(record, key, list) if key in record else []
    wrong = next((item for item in found if not isinstance(item, kind)), None)
    if wrong is not None:
        raise ValueError(f"{key}: a list of {kind.__name__} expected, got {str(wrong)[:80]!r} in it")
    return list(found)


def _optional_float(found: Any, name: str) -> float | None:
    """Return a finite number or None."""
    if found is None:
        return None
    is_number = isinstance(found, int | float) and not isinstance(found, bool)
    if not (is_number and abs(found) <= sys.float_info.max):  # nan, infinite, or whole with hundreds of digits
        raise ValueError(f"{name}: a number expected, got {str(found)[:80]!r}")
    return float(found)


def _optional_int(found: Any, name: str) -> int | None:
    """Return a whole number or None."""
    size = _optional_float(found, name)
    if size is not None and size != int(size):
        raise ValueError(f"{name}: a whole number expected, got {str(found)[:80]!r}")
    return None if size is None else int(size)


def _question_metadata(question: Question) -> dict[str, Any]:
    """Return what `_parse_question` reads besides the texts; gold is "" where no answer is known."""
    names = ("policy_a", "policy_b", "reason", "priority", "labels_wanted")
    return {"question_id": question.id, "gold": question.gold or ""} | {name: getattr(question, name) for name in names}


def _parse_question(texts: dict[str, Any], metadata: dict[str, Any], *keys: str) -> Question:
    """Build a question from the texts under three keys; the metadata may hold any of `_question_metadata`."""
    prompt, response_a, response_b = (_get(texts, key, str) for key in keys)
    gold = metadata.get("gold") or None
    if gold not in (None, *VALUED_CHOICES):
        raise ValueError(f"gold: {gold!r} should be a, b, tie or both_bad")
    wanted = _optional_int(metadata.get("labels_wanted"), "labels_wanted")
    if wanted is not None and not 0 <= wanted <= MAX_LABELS_WANTED:
        raise ValueError(f"labels_wanted: {wanted} should be from 0 to {MAX_LABELS_WANTED}")
    return Question(
        id=metadata.get("question_id") or question_id(prompt, response_a, response_b),
        prompt=prompt, response_a=response_a, response_b=response_b, gold=gold,
        policy_a=_get(metadata, "policy_a", str, "unknown"), policy_b=_get(metadata, "policy_b", str, "unknown"),
        reason=_get(metadata, "reason", str, "imported"), labels_wanted=1 if wanted is None else wanted,
        priority=_optional_float(metadata.get("priority"), "priority") or 0.0,
    )  # fmt: skip
