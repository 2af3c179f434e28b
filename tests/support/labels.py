"""Short ways to write questions, labels and stores."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, create_engine, insert

from tasks.labelling import database
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


@contextmanager
def begun(url: str) -> Iterator[Connection]:
    """A transaction in a database as it is; it does not wait for others."""
    engine = create_engine(url, connect_args={"timeout": 0} if url.startswith("sqlite") else {})
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


def insert_label(url: str, question: str, labeller: str, **values: Any) -> None:
    """Write a label behind the store's back."""
    event = {"token": token(), "question_id": question, "labeller": labeller, "previous_event": 0, "kind": "label"}
    with begun(url) as connection:
        connection.execute(insert(database.events), event | values)


def memory_store(*questions: Question) -> LabelStore:
    """A store in memory, for one thread."""
    store = LabelStore("sqlite://")
    store.add_questions(questions)
    return store
