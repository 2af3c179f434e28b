"""Tasks as Label Studio exports and imports them, for the interface `CONFIG`.

People's labels are annotations, models' are predictions. Which response a labeller saw first has no place in a task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tasks.labelling.labels import Label, Question, by_model
from tasks.labelling.queries import MODEL
from tasks.labelling.records import number, question, value

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
    data = {"prompt": asked.prompt, "answer1": asked.response_a, "answer2": asked.response_b, "ours": asked.id,
            "policy_a": asked.policy_a, "policy_b": asked.policy_b, "gold": asked.gold or ""}  # fmt: skip
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
    asked = question(data, data, "prompt", "answer1", "answer2", data.get("ours"))
    labels = [_label(asked.id, _labeller(own), own) for own in value(content, "annotations", list, [])]
    for own in value(content, "predictions", list, []):
        labels.append(_label(asked.id, MODEL + value(own, "model_version", str), own))
    return asked, labels


def _annotation(label: Label) -> dict[str, Any]:
    """`completed_by` with an e-mail address is how Label Studio names a person it may not know by number."""
    return {
        "completed_by": {"email": label.labeller},
        "was_cancelled": label.choice == "skip",
        "lead_time": label.seconds,
        "result": _result(label),
    }


def _result(label: Label) -> list[dict[str, Any]]:
    result = []
    if label.choice in SIDES:
        result.append(_part("preference", "preference", "pairwise", {"selected": SIDES[label.choice]}))
    elif label.choice != "skip":
        result.append(_part("alike", "prompt", "choices", {"choices": [label.choice]}))
    for name, to in RATINGS.items():
        if (rating := getattr(label, name)) is not None:
            result.append(_part(name, to, "rating", {"rating": rating}))
    if label.comment:
        result.append(_part("comment", "prompt", "textarea", {"text": [label.comment]}))
    return result


def _part(name: str, to: str, kind: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "from_name": name, "to_name": to, "type": kind, "value": content}


def _labeller(annotation: dict[str, Any]) -> str:
    who = annotation.get("completed_by") if isinstance(annotation, dict) else None
    if isinstance(who, dict):
        return str(value(who, "email", str))
    if not isinstance(who, int):
        raise ValueError(f"completed_by: a number or an object with an email expected, got {str(who)[:80]!r}")
    return f"label-studio:{who}"


def _label(item: str, labeller: str, own: Any) -> Label:
    parts = {value(part, "from_name", str): value(part, "value", dict) for part in value(own, "result", list, [])}
    strength, rating_a, rating_b = (number(parts.get(name, {}).get("rating"), name) for name in RATINGS)
    comment = "\n".join(map(str, value(parts.get("comment", {}), "text", list, []))) or None
    seconds = own.get("lead_time")
    if seconds is not None and not isinstance(seconds, int | float):
        raise ValueError(f"lead_time: seconds expected, got {str(seconds)[:80]!r}")
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
