"""Questions and labels in the database: what a labeller thinks now, and nothing twice."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from tasks.core.errors import DataError
from tasks.labelling.labels import (
    Label,
    add_label,
    add_questions,
    current_labels,
    flaw,
    mirrored,
    pseudonym,
    question_id,
    questions,
)
from tasks.labelling.tables import Event
from tests.unit.labelling.made import pair


def test_a_question_is_the_same_in_either_order_and_asked_once(session: Session) -> None:
    assert question_id("p", "x", "y") == question_id("p", "y", "x") != question_id("q", "x", "y")
    assert question_id("p", "x", "yz") != question_id("px", "", "yz")
    asked = [pair(1), pair(2, priority=1.0, gold="b", labels_wanted=2), pair(1)]
    assert add_questions(session, asked) == 2
    assert add_questions(session, asked) == 0
    assert questions(session) == [asked[1], asked[0]], "higher priority first"


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"response_b": "x\0"}, "response_b: holds a NUL character"), ({"policy_a": "x" * 65}, "policy_a: 65 characters")],
)
def test_what_no_database_keeps_is_not_asked(session: Session, change: dict[str, str], reason: str) -> None:
    with pytest.raises(DataError, match=f"'prompt 2': {reason}.*nothing was added: leave it out"):
        add_questions(session, [pair(1), replace(pair(2), **change)])
    assert questions(session) == []


def test_the_last_event_is_what_a_labeller_thinks(session: Session) -> None:
    add_questions(session, [pair(1)])
    first = Label(pair(1).id, "ann", "a", 2, 4, 1, "why", swapped=True, seconds=3.5)
    assert add_label(session, first)
    assert not add_label(session, replace(first, seconds=9.0)), "the same opinion again"
    assert current_labels(session) == [first]
    second = replace(first, choice="tie", strength=None)
    assert add_label(session, second)
    assert current_labels(session) == [second]
    assert add_label(session, first), "back to the first opinion is a change, too"
    assert [event.after for event in session.scalars(select(Event).order_by(Event.id))] == [0, 1, 2]
    session.add(Event(token="t", item_id=first.item, labeller="ann", after=3, kind="undo"))
    session.flush()
    assert current_labels(session) == []
    assert add_label(session, second, token="own")
    assert not add_label(session, first, token="own"), "an event of that token is there"


def test_a_mirrored_label_means_the_same_of_the_other_order() -> None:
    label = Label("i", "ann", "a", 3, 5, 2, swapped=True)
    assert mirrored(label) == Label("i", "ann", "b", 3, 2, 5, swapped=False)
    assert mirrored(mirrored(label)) == label
    assert mirrored(replace(label, choice="both_bad")).choice == "both_bad"


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (Label("i", "ann", "a", 3, 1, 5), None),
        (Label("i", "ann", "A"), "choice: 'A' is none of a, b"),
        (Label("i", "ann", "tie", 1), "strength: 1 with 'tie'"),
        (Label("i", "ann", "a", 4), "strength: 4"),
        (Label("i", "ann", "a", None, 0, None), "rating: "),
        (Label("i", "x" * 65, "a"), "labeller: "),
        (Label("i", "", "a"), "labeller: "),
        (Label("i", "a\0", "a"), "labeller: "),
        (Label("i", "ann", "a", comment="x" * 5000), None),
        (Label("i", "ann", "a", comment="x\0"), "comment: holds a NUL character"),
        (Label("i", "ann", "a", comment="x" * 5001), "comment: 5001 characters, at most 5000"),
    ],
)
def test_what_is_no_label_says_why(label: Label, reason: str | None) -> None:
    found = flaw(label)
    assert found is None if reason is None else (found or "").startswith(reason)


def test_a_pseudonym_is_stable_tells_people_apart_and_leaves_models() -> None:
    assert pseudonym("ann") == pseudonym("ann") != pseudonym("bob")
    assert "ann" not in pseudonym("ann")
    assert pseudonym("model:m") == "model:m"


@pytest.mark.parametrize("name", [pseudonym("ann"), f"argilla:{UUID(int=7)}", "label-studio:3"])
def test_who_has_no_name_keeps_the_pseudonym(name: str) -> None:
    assert pseudonym(name) == name
    assert pseudonym(f"{name}x") != f"{name}x"
