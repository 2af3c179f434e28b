"""The summary by hand, and a page that holds everything itself."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from tasks.labelling.agreement import Proportion
from tasks.labelling.export import export_preferences
from tasks.labelling.labels import Label, pseudonyms
from tasks.labelling.report import LabelSummary, format_proportion, label_summary, report_page
from tasks.labelling.store import LabelStore
from tests.support.labels import labels_of, pair

GOLD = pair(9, gold="a")
ASKED = [pair(1, labels_wanted=2), pair(2, labels_wanted=2), pair(3), pair(4), GOLD]


def labels() -> list[Label]:
    ann = [replace(label, seconds=4.0 * number, swapped=number > 1) for number, label in enumerate([
        *labels_of(pair(1), ann="a 2"), *labels_of(pair(2), ann="b 3"), *labels_of(GOLD, ann="a 1"),
    ], start=1)]  # fmt: skip
    rest = [*labels_of(pair(1), bob="b"), *labels_of(GOLD, bob="skip"), *labels_of(pair(3), bob="tie")]
    return [*ann, *rest, Label(pair(1).id, "model:m", "a")]


def summary() -> LabelSummary:
    return label_summary(ASKED, labels())


def test_the_summary_by_hand() -> None:
    found = summary()
    assert (found.questions, found.labelled, found.labels) == (5, 4, 7)
    assert found.waiting == 1 + 1, (
        "one more for the second question, one for the fourth; the model's label is no person's"
    )
    assert found.alpha == pytest.approx(0.0), "two values of one question that differ: as by chance"
    assert found.alpha_all is not None
    assert found.agreement == Proportion(0, 1)
    # Ann: a shown first; b, shown first; a, shown second. Bob: b, shown second.
    assert found.first == Proportion(2, 4)
    assert found.choices == {"a": 3, "b": 2, "tie": 1, "both_bad": 0, "skip": 1}
    assert found.strengths == {"slightly": 1, "clearly": 1, "far better": 1}
    assert found.seconds == {"0–2": 0, "2–5": 1, "5–10": 1, "10–20": 1, "20–40": 0, "40–80": 0, "80+": 0}
    assert [(row.name, row.labels, row.skips, row.ties) for row in found.labellers] == [
        ("ann", 3, 0, 0), ("bob", 3, 1, 1), ("model:m", 1, 0, 0),
    ]  # fmt: skip
    ann, bob, model = found.labellers
    assert (ann.gold, bob.gold, ann.seconds, bob.seconds) == (Proportion(1, 1), Proportion(0, 0), 8.0, None)
    assert model.first == Proportion(0, 0), "a model is asked in both orders"
    assert [question.id for question, _ in found.disputed] == [pair(1).id]


def test_known_answers_do_not_count_as_agreement() -> None:
    """Chance alone on questions, unanimity on the test questions: α of the former only, as the export's card has it."""
    asked = [pair(number) for number in range(4)]
    tests = [pair(number, gold="ab"[number % 2]) for number in range(10, 16)]
    labels = [
        label for number, item in enumerate(asked) for label in labels_of(item, ann="abab"[number], bob="abba"[number])
    ]
    labels += [label for item in tests for label in labels_of(item, ann=item.gold or "", bob=item.gold or "")]
    labels += [Label(item.id, "model:m", item.gold or "") for item in tests]
    found = label_summary([*asked, *tests], labels)
    card = export_preferences([*asked, *tests], labels, aggregate="none", names=pseudonyms(labels)).card
    assert found.agreement == Proportion(2, 4)
    assert found.alpha == pytest.approx(card["alpha_people"])
    assert found.alpha_all == pytest.approx(card["alpha"])
    assert found.alpha is not None
    assert found.alpha < 0.2
    assert "leave out questions with a known answer" in " ".join(report_page(found).split())


def test_a_skip_leaves_a_question_waiting_as_it_does_for_the_page(store: LabelStore) -> None:
    store.add_questions([pair(1)])
    store.save_label(Label(pair(1).id, "ann", "skip"))
    found = label_summary(store.questions(), store.current_labels())
    assert (found.waiting, found.labelled) == (store.open_questions()[0], 0) == (1, 0)


def test_a_proportion_is_shown_with_its_interval() -> None:
    assert format_proportion(Proportion(8, 10)) == "80% (49–94), 8 of 10"
    assert format_proportion(Proportion(0, 0)) == "–"


class Tags(HTMLParser):
    """Whether what was opened is closed, and what is fetched from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing() -> None:
    page = report_page(summary())
    tags = Tags()
    tags.feed(page)
    assert (tags.open, tags.fetched) == ([], [])
    assert "http" not in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert page == report_page(summary()), "equal labels, equal bytes"
    text = re.sub(r"<[^>]*>", " ", page)
    assert "50% (15–85), 2 of 4" in text
    assert "100% (21–100), 1 of 1" in text


def test_what_people_wrote_stays_text() -> None:
    evil = replace(pair(1), response_a="<script>alert(1)</script>")
    page = report_page(label_summary([evil], labels_of(evil, **{"<b>": "a", "bob": "b"})))
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert "<b></th>" not in page


def test_a_page_without_labels_has_no_empty_charts() -> None:
    page = report_page(label_summary(ASKED, []))
    assert "<h3>Choices" not in page
    assert "0 labels of 0 of 5 questions; 6 more are wanted." in page
