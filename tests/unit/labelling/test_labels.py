"""Questions and labels as values: their ids, their validation, the order shown, and pseudonyms."""

from dataclasses import replace
from uuid import UUID

import pytest

from tasks.labelling.labels import Label, flip, label_error, pseudonym, question_id, show_swapped


def test_a_question_is_the_same_in_either_order() -> None:
    assert question_id("p", "x", "y") == question_id("p", "y", "x") != question_id("q", "x", "y")
    assert question_id("p", "x", "yz") != question_id("px", "", "yz")


def test_the_order_shown_is_even_and_stays() -> None:
    sides = [show_swapped(f"item{number}", "ann") for number in range(1000)]
    assert 440 < sum(sides) < 560  # 500 ± 3.8 standard deviations
    assert sides == [show_swapped(f"item{number}", "ann") for number in range(1000)]
    assert sides != [show_swapped(f"item{number}", "bob") for number in range(1000)]


def test_a_flipped_label_means_the_same_in_the_other_order() -> None:
    label = Label("i", "ann", "a", 3, 5, 2, swapped=True)
    assert flip(label) == Label("i", "ann", "b", 3, 2, 5, swapped=False)
    assert flip(flip(label)) == label
    assert flip(replace(label, choice="both_bad")).choice == "both_bad"


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (Label("i", "ann", "a", 3, 1, 5), None),
        (Label("i", "ann", "A"), "choice: 'A' is none of a, b"),
        (Label("i", "ann", "tie", 1), "strength: 1 with 'tie'"),
        (Label("i", "ann", "a", 4), "strength: 4"),
        (Label("i", "ann", "a", None, 0, None), "rating: "),
        (Label("i", "ann", "a", None, None, 6), "rating: "),
        (Label("i", "x" * 65, "a"), "labeller: "),
        (Label("i", "", "a"), "labeller: "),
        (Label("i", "a\0", "a"), "labeller: "),
        (Label("i", "ann", "a", comment="x" * 5000), None),
        (Label("i", "ann", "a", comment="x\0"), "comment: holds a NUL character"),
        (Label("i", "ann", "a", comment="x" * 5001), "comment: 5001 characters, at most 5000"),
    ],
)
def test_what_is_no_label_gives_a_reason(label: Label, reason: str | None) -> None:
    found = label_error(label)
    assert found is None if reason is None else (found or "").startswith(reason)


def test_a_pseudonym_is_stable_differs_between_people_and_leaves_models() -> None:
    assert pseudonym("ann") == pseudonym("ann") != pseudonym("bob")
    assert "ann" not in pseudonym("ann")
    assert pseudonym("model:m") == "model:m"


@pytest.mark.parametrize("name", [pseudonym("ann"), f"argilla:{UUID(int=7)}", "label-studio:3"])
def test_an_anonymous_labeller_keeps_the_pseudonym(name: str) -> None:
    assert pseudonym(name) == name
    assert pseudonym(f"{name}x") != f"{name}x"
