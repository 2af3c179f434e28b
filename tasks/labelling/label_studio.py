"""Tasks as Label Studio exports and imports them, for the interface `CONFIG`.

People's labels are annotations, models' are predictions. Label Studio refuses an annotation of an e-mail address that
it does not know, and has no field for another name: so ours stands in the id of each part of an annotation's
result, as `<labeller>/<part>`, which Label Studio keeps; one that says nothing has an empty comment to bear it. The
data hold the texts, what we know of the question (`records.facts`), and in `swapped` who saw answer2 first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tasks.labelling.labels import Label, Question, by_model
from tasks.labelling.queries import LABEL_STUDIO, MODEL
from tasks.labelling.records import facts, number, question, real, value, values

__all__ = ["CONFIG", "parsed", "task"]

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
"""The labelling interface: choose one of two, or say that they are alike; a skipped task is a skip."""

SIDES = {"a": "left", "b": "right"}
RATINGS = {"strength": "prompt", "rating_a": "answer1", "rating_b": "answer2"}


def task(asked: Question, labels: Sequence[Label]) -> dict[str, Any]:
    """A question with its labels."""
    data = {"prompt": asked.prompt, "answer1": asked.response_a, "answer2": asked.response_b} | facts(asked)
    data["swapped"] = [label.labeller for label in labels if label.swapped]
    annotations = [_annotation(label) for label in labels if not by_model(label.labeller)]
    predictions = [
        {"model_version": label.labeller.removeprefix(MODEL), "result": _result(label)}
        for label in labels
        if by_model(label.labeller)
    ]
    return {"data": data, "annotations": annotations, "predictions": predictions}


def parsed(content: Any) -> tuple[Question, list[Label]]:
    """A question and its labels.

    Raises:
        ValueError: it is no such task; with the reason.
    """
    data = value(content, "data", dict)
    asked = question(data, data, "prompt", "answer1", "answer2")
    swapped = values(data, "swapped", str)
    labels = [_label(asked.id, _labeller(own), own) for own in value(content, "annotations", list, [])]
    for own in value(content, "predictions", list, []):
        labels.append(_label(asked.id, MODEL + value(own, "model_version", str), own))
    return asked, [replace(label, swapped=label.labeller in swapped) for label in labels]


def _annotation(label: Label) -> dict[str, Any]:
    """`completed_by` is a person whom Label Studio can know: an e-mail address, or the number that it gave."""
    number = label.labeller.removeprefix(LABEL_STUDIO)
    known: dict[str, Any] = {"completed_by": {"email": label.labeller}} if "@" in label.labeller else {}
    if number != label.labeller and number.isdecimal():
        known = {"completed_by": int(number)}
    return known | {
        "was_cancelled": label.choice == "skip",
        "lead_time": label.seconds,
        "result": _result(label),
    }


def _result(label: Label) -> list[dict[str, Any]]:
    said: list[tuple[str, str, str, dict[str, Any]]] = []
    if label.choice in SIDES:
        said.append(("preference", "preference", "pairwise", {"selected": SIDES[label.choice]}))
    elif label.choice != "skip":
        said.append(("alike", "prompt", "choices", {"choices": [label.choice]}))
    for name, to in RATINGS.items():
        if (rating := getattr(label, name)) is not None:
            said.append((name, to, "rating", {"rating": rating}))
    if label.comment or not said:
        said.append(("comment", "prompt", "textarea", {"text": [label.comment] if label.comment else []}))
    # A prediction may become the start of a person's annotation, which must not bear the model's name.
    who = "" if by_model(label.labeller) else f"{label.labeller}/"
    return [
        {"id": f"{who}{name}", "from_name": name, "to_name": to, "type": kind, "value": content}
        for name, to, kind, content in said
    ]


def _labeller(annotation: dict[str, Any]) -> str:
    """Our name where it stands in a part's id, else Label Studio's e-mail address or number."""
    for part in value(annotation, "result", list, []):
        name, slash, rest = str(value(part, "id", object, "")).rpartition("/")
        if slash and rest == part.get("from_name"):
            return name
    who = annotation.get("completed_by")
    if isinstance(who, dict):
        return str(value(who, "email", str))
    if not isinstance(who, int):
        raise ValueError(f"completed_by: a number or an object with an email expected, got {str(who)[:80]!r}")
    return f"{LABEL_STUDIO}{who}"


def _label(item: str, labeller: str, own: Any) -> Label:
    parts = {value(part, "from_name", str): value(part, "value", dict) for part in value(own, "result", list, [])}
    strength, rating_a, rating_b = (number(parts.get(name, {}).get("rating"), name) for name in RATINGS)
    comment = "\n".join(map(str, value(parts.get("comment", {}), "text", list, []))) or None
    seconds = real(own.get("lead_time"), "lead_time")
    return Label(item, labeller, _choice(own, parts), strength, rating_a, rating_b, comment, seconds=seconds)


def _choice(own: dict[str, Any], parts: dict[str, dict[str, Any]]) -> str:
    """A side that was selected and a tie exclude each other; of a model, neither is a skip."""
    if own.get("was_cancelled"):
        return "skip"
    selected = parts.get("preference", {}).get("selected")
    alike = value(parts.get("alike", {}), "choices", list, [])
    if (selected is not None) + len(alike) != 1:
        if "model_version" in own:
            return "skip"
        raise ValueError(f"result: either a side or one of tie and both_bad expected, got {selected!r} and {alike}")
    if selected is None:
        return str(alike[0])
    if selected not in SIDES.values():
        raise ValueError(f"result: selected is {selected!r}, and should be left or right")
    return "a" if selected == "left" else "b"
