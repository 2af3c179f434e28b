"""Rows that feedback becomes, and feedback that becomes none."""

import itertools

from tasks.core.rows import Demonstration, Preference, Rating
from tasks.labelling.labels import pseudonym
from tasks.runtime.mlflow_traces import Feedback
from tasks.serving.feedback import feedback_rows

ANN, BOB = pseudonym("ann"), pseudonym("bob")
NOTHING = frozenset[str]()


def feedback(kind: str, value: object, *, user: str = "ann", answer_id: str = "tr-1", answer: str | None = " was good",
         prompt: str | None = "This film") -> Feedback:  # fmt: skip
    return Feedback(answer_id, prompt, answer, user, kind, value)  # type: ignore[arg-type]


def test_each_kind_of_feedback_gives_its_row() -> None:
    given = [
        feedback("demonstration", "was bad"),
        feedback("preference", " was"),
        feedback("rating", 1.0),
        feedback("rating", 0.5, user=BOB),
    ]
    result = feedback_rows(given, NOTHING)
    (demonstration,), (preference,), (rating,) = (
        result.rows[name] for name in ("demonstrations", "preferences", "ratings")
    )
    assert isinstance(demonstration, Demonstration)
    assert (demonstration.prompt, demonstration.response) == ("This film", " was bad"), "with the answer's own space"
    assert isinstance(preference, Preference)
    assert (preference.chosen, preference.rejected, preference.labelled_by) == (" was good", " was", (ANN,))
    assert isinstance(rating, Rating)
    assert (rating.text, rating.ratings) == ("This film was good", (0.5, 1.0))
    assert rating.id.startswith("+".join(sorted([ANN, BOB])))
    assert result.dropped == {}


def test_what_gives_no_row_is_counted() -> None:
    given = [
        feedback("rating", 1.0, answer=None, answer_id="tr-2"),
        feedback("rating", 5.0, answer_id="tr-3"),
        feedback("demonstration", " x", prompt="this  FILM is", answer_id="tr-4"),
        feedback("preference", None, answer_id="tr-5"),
        feedback("preference", " was good", answer_id="tr-6"),
        feedback("demonstration", "twice"),
        feedback("demonstration", "twice", user="bob"),
        feedback("rating", -1.0),
        feedback("rating", 1.0),
    ]
    result = feedback_rows(given, {"this film is"})
    assert result.dropped == {
        "no_content": 1, "out_of_scale": 1, "held_out": 1, "other_prompt": 1, "no_difference": 1, "duplicate": 1,
        "repeated": 1,
    }  # fmt: skip
    (rating,) = result.rows["ratings"]
    assert isinstance(rating, Rating)
    assert rating.ratings == (1.0,), "the last counts"


def test_the_order_of_answers_changes_nothing() -> None:
    given = [
        feedback("demonstration", f"text {number}", user=user, answer_id=f"tr-{number}")
        for number, user in itertools.product(range(3), ["ann", "bob"])
    ]
    assert feedback_rows(given, NOTHING) == feedback_rows(given[::-1], NOTHING)
