"""Short ways to write questions, labels and stores."""

from __future__ import annotations

import uuid
from typing import Any

from tasks.labelling.labels import Label, Question, question_id
from tasks.labelling.store import LabelStore


def pair(number: int, **values: Any) -> Question:
    """A question whose first response is the longer one, under the id of its texts."""
    prompt, one, other = f"prompt {number}", f" first {number} long", f" other {number}"
    name = question_id(prompt, one, other)
    return Question(name, prompt, one, other, "sft", "ppo", "random", **values)


def make_question(name: str, **values: Any) -> Question:
    """A question whose id and texts hold its name."""
    texts = {"prompt": f"prompt {name}", "response_a": f"first {name}", "response_b": f"second {name}"}
    return Question(**{"id": name, **texts, "policy_a": "sft", "policy_b": "ppo", "reason": "random", **values})


def labels_of(question: Question, **choices: str) -> list[Label]:
    """A label of each labeller: a name and a choice, with its strength behind a blank: `ann="a 2"`."""
    labels = []
    for labeller, text in choices.items():
        choice, _, strength = text.partition(" ")
        labels.append(Label(question.id, labeller, choice, int(strength) if strength else None))
    return labels


def token() -> str:
    return str(uuid.uuid4())


def memory_store(*questions: Question) -> LabelStore:
    """A store in memory, for one thread."""
    store = LabelStore("sqlite://")
    store.add_questions(questions)
    return store
