"""The figures by hand, and a page that holds everything itself."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from tasks.labelling.agreement import Share
from tasks.labelling.answers import Answer
from tasks.labelling.dataset import dataset
from tasks.labelling.labels import Label, pseudonyms
from tasks.labelling.report import Report, report, report_page, share
from tasks.labelling.store import LabelStore
from tests.unit.labelling.conftest import make_item, token
from tests.unit.labelling.made import pair, said

GOLD = pair(9, gold="a")
ASKED = [pair(1, labels_wanted=2), pair(2, labels_wanted=2), pair(3), pair(4), GOLD]


def labels() -> list[Label]:
    ann = [replace(label, seconds=4.0 * number, swapped=number > 1) for number, label in enumerate([
        *said(pair(1), ann="a 2"), *said(pair(2), ann="b 3"), *said(GOLD, ann="a 1"),
    ], start=1)]  # fmt: skip
    rest = [*said(pair(1), bob="b"), *said(GOLD, bob="skip"), *said(pair(3), bob="tie")]
    return [*ann, *rest, Label(pair(1).id, "model:m", "a")]


def made() -> Report:
    return report(ASKED, labels())


def test_the_figures_by_hand() -> None:
    found = made()
    assert (found.questions, found.labelled, found.labels) == (5, 4, 7)
    assert found.waiting == 1 + 1, (
        "one more for the second question, one for the fourth; the model's label is no person's"
    )
    assert found.alpha == pytest.approx(0.0), "two values of one question that differ: as by chance"
    assert found.alpha_all is not None
    assert found.agreement == Share(0, 1)
    # Ann: a shown first; b, shown first; a, shown second. Bob: b, shown second.
    assert found.first == Share(2, 4)
    assert found.choices == {"a": 3, "b": 2, "tie": 1, "both_bad": 0, "skip": 1}
    assert found.strengths == {"slightly": 1, "clearly": 1, "far better": 1}
    assert found.seconds == {"0–2": 0, "2–5": 1, "5–10": 1, "10–20": 1, "20–40": 0, "40–80": 0, "80+": 0}
    assert [(row.name, row.labels, row.skips, row.alike) for row in found.labellers] == [
        ("ann", 3, 0, 0), ("bob", 3, 1, 1), ("model:m", 1, 0, 0),
    ]  # fmt: skip
    ann, bob, model = found.labellers
    assert (ann.gold, bob.gold, ann.seconds, bob.seconds) == (Share(1, 1), Share(0, 0), 8.0, None)
    assert model.first == Share(0, 0), "a model is asked in both orders"
    assert [question.id for question, _ in found.disputed] == [pair(1).id]


def test_known_answers_do_not_count_as_agreement() -> None:
    """Chance alone on questions, unanimity on the test questions: α of the former only, as the export's card has it."""
    asked = [pair(number) for number in range(4)]
    tests = [pair(number, gold="ab"[number % 2]) for number in range(10, 16)]
    labels = [
        label for number, item in enumerate(asked) for label in said(item, ann="abab"[number], bob="abba"[number])
    ]
    labels += [label for item in tests for label in said(item, ann=item.gold or "", bob=item.gold or "")]
    labels += [Label(item.id, "model:m", item.gold or "") for item in tests]
    found = report([*asked, *tests], labels)
    card = dataset([*asked, *tests], labels, aggregate="none", names=pseudonyms(labels)).card
    assert found.agreement == Share(2, 4)
    assert found.alpha == pytest.approx(card["alpha_people"])
    assert found.alpha_all == pytest.approx(card["alpha"])
    assert found.alpha is not None
    assert found.alpha < 0.2
    assert "leave out questions with a known answer" in " ".join(report_page(found).split())


def test_a_skip_leaves_a_question_waiting_as_it_does_for_the_page(store: LabelStore) -> None:
    store.add_items([make_item("one")])
    store.record("ann", "one", token(), 0, Answer("skip"))
    found = report([replace(pair(1), id="one")], [Label("one", "ann", "skip")])
    assert (found.waiting, found.labelled) == (store.open_items()[0], 0)


def test_a_share_is_written_with_its_interval() -> None:
    assert share(Share(8, 10)) == "80% (49–94), 8 of 10"
    assert share(Share(0, 0)) == "–"


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
    page = report_page(made())
    tags = Tags()
    tags.feed(page)
    assert (tags.open, tags.fetched) == ([], [])
    assert "http" not in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert page == report_page(made()), "equal labels, equal bytes"
    text = re.sub(r"<[^>]*>", " ", page)
    assert "50% (15–85), 2 of 4" in text
    assert "100% (21–100), 1 of 1" in text


def test_what_people_wrote_stays_text() -> None:
    evil = replace(pair(1), response_a="<script>alert(1)</script>")
    page = report_page(report([evil], said(evil, **{"<b>": "a", "bob": "b"})))
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert "<b></th>" not in page


def test_a_page_without_labels_has_no_empty_charts() -> None:
    page = report_page(report(ASKED, []))
    assert "What was chosen" not in page
    assert "0 labels of 0 of 5 questions; 6 more are wanted." in page
