"""Short ways to write questions and labels."""

from __future__ import annotations

from typing import Any

from tasks.labelling.labels import Label, Question, question_id


def pair(number: int, **values: Any) -> Question:
    """Two responses, of which the first is the longer one."""
    prompt, one, other = f"prompt {number}", f" first {number} long", f" other {number}"
    name = question_id(prompt, one, other)
    return Question(name, prompt, one, other, "sft", "ppo", "random", **values)


def said(question: Question, **choices: str) -> list[Label]:
    """What each labeller chose: a name and a choice, with its strength behind a blank: `ann="a 2"`."""
    labels = []
    for labeller, words in choices.items():
        choice, _, strength = words.partition(" ")
        labels.append(Label(question.id, labeller, choice, int(strength) if strength else None))
    return labels
