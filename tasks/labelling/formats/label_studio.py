"""Tasks as Label Studio exports and imports them, for the interface `CONFIG`.

People's labels are annotations, models' are predictions. Label Studio refuses an annotation of an e-mail address that
it does not know, and has no field for another name: so ours stands in the id of each part of an annotation's
result, as `<labeller>/<part>`, which Label Studio keeps; a result without parts gets an empty comment for it. The
data hold the texts, what we know of the question (`fields.question_metadata`), and in `swapped` who saw answer2 first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tasks.labelling.formats.fields import (
    get,
    get_list,
    optional_float,
    optional_int,
    parse_question,
    question_metadata,
)
from tasks.labelling.labels import LABEL_STUDIO_PREFIX, MODEL_PREFIX, Label, Question, is_model

__all__ = ["CONFIG", "from_record", "to_record"]

CONFIG = """<View>
  <Text name="prompt" value="$prompt"/>
  <Pairwise name="preference" toName="answer1,answer2" selectionStyle="outline: 3px solid #0b62c4"/>
  <View style="display: grid; grid-template-columns: 1fr 1fr; gap: 1rem">
    <Text name="answer1" value="$answer1"/>
    <Text name="answer2" value="$answer2"/>
  </View>
  <Choices name="alike" toName="prompt" choice="single" showInline="true">
    <Choice value="tie"/>
    <Choice value="both_bad"/>
  </Choices>
  <Rating name="strength" toName="prompt" maxRating="3"/>
  <Rating name="rating_a" toName="answer1" maxRating="5"/>
  <Rating name="rating_b" toName="answer2" maxRating="5"/>
  <TextArea name="comment" toName="prompt"/>
</View>
"""
"""The labelling interface: choose one of two, tie or both bad; a skipped task is a skip."""

SIDES = {"a": "left", "b": "right"}
RATINGS = {"strength": "prompt", "rating_a": "answer1", "rating_b": "answer2"}


def to_record(question: Question, labels: Sequence[Label]) -> dict[str, Any]:
    """Return a question with its labels."""
    data = {"prompt": question.prompt, "answer1": question.response_a, "answer2": question.response_b}
    data |= question_metadata(question) | {"swapped": [label.labeller for label in labels if label.swapped]}
    annotations = [_annotation(label) for label in labels if not is_model(label.labeller)]
    predictions = [
        {"model_version": label.labeller.removeprefix(MODEL_PREFIX), "result": _result(label)}
        for label in labels
        if is_model(label.labeller)
    ]
    return {"data": data, "annotations": annotations, "predictions": predictions}


def from_record(record: Any) -> tuple[Question, list[Label]]:
    """Return a question and its labels.

    Raises:
        ValueError: it is no such task; with the reason.
    """
    data = get(record, "data", dict)
    question = parse_question(data, data, "prompt", "answer1", "answer2")
    swapped = get_list(data, "swapped", str)
    given = [(_labeller(own), own) for own in get(record, "annotations", list, [])]
    given += [(MODEL_PREFIX + get(own, "model_version", str), own) for own in get(record, "predictions", list, [])]
    return question, [_label(question.id, name, own, name in swapped) for name, own in given]


def _annotation(label: Label) -> dict[str, Any]:
    """Name in `completed_by` only people that Label Studio can know: by e-mail address, or the number that it gave."""
    number = label.labeller.removeprefix(LABEL_STUDIO_PREFIX)
    known: dict[str, Any] = {"completed_by": {"email": label.labeller}} if "@" in label.labeller else {}
    if number != label.labeller and number.isdecimal():
        known = {"completed_by": int(number)}
    return known | {"was_cancelled": label.choice == "skip", "lead_time": label.seconds, "result": _result(label)}


def _result(label: Label) -> list[dict[str, Any]]:
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


def _labeller(annotation: dict[str, Any]) -> str:
    """Return our name where it stands in a part's id, else Label Studio's e-mail address or number."""
    for part in get(annotation, "result", list, []):
        name, slash, rest = str(get(part, "id", object, "")).rpartition("/")
        if slash and rest == part.get("from_name"):
            return name
    user = annotation.get("completed_by")
    if isinstance(user, dict):
        return str(get(user, "email", str))
    if not isinstance(user, int):
        raise ValueError(f"completed_by: a number or an object with an email expected, got {str(user)[:80]!r}")
    return f"{LABEL_STUDIO_PREFIX}{user}"


def _label(question_id: str, labeller: str, own: Any, swapped: bool) -> Label:
    parts = {get(part, "from_name", str): get(part, "value", dict) for part in get(own, "result", list, [])}
    strength, rating_a, rating_b = (optional_int(parts.get(name, {}).get("rating"), name) for name in RATINGS)
    comment = "\n".join(map(str, get(parts.get("comment", {}), "text", list, []))) or None
    seconds = optional_float(own.get("lead_time"), "lead_time")
    choice = _choice(own, parts)
    return Label(question_id, labeller, choice, strength, rating_a, rating_b, comment, swapped, seconds)


def _choice(own: dict[str, Any], parts: dict[str, dict[str, Any]]) -> str:
    """Return the selected side, or one of tie and both_bad, never both; a model's result with neither is a skip."""
    if own.get("was_cancelled"):
        return "skip"
    selected = parts.get("preference", {}).get("selected")
    alike = get(parts.get("alike", {}), "choices", list, [])
    if (selected is not None) + len(alike) != 1:
        if "model_version" in own:
            return "skip"
        raise ValueError(f"result: either a side or one of tie and both_bad expected, got {selected!r} and {alike}")
    if selected is None:
        return str(alike[0])
    if selected not in SIDES.values():
        raise ValueError(f"result: selected is {selected!r}, and should be left or right")
    return "a" if selected == "left" else "b"
