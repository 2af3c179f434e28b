"""Label quality against arithmetic by hand and an independent implementation, and the page that reports it."""

import random
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from nltk.metrics.agreement import AnnotationTask

from tasks.core.errors import ConfigError
from tasks.labelling import quality
from tasks.labelling.export import export_preferences
from tasks.labelling.labels import Label
from tasks.labelling.quality import (
    EM_ITERATIONS,
    Proportion,
    dawid_skene,
    first_position_rate,
    format_proportion,
    gold_accuracy,
    krippendorff_alpha,
    label_summary,
    majority,
    raw_agreement,
    report_page,
)
from tasks.labelling.store import LabelStore
from tests.support.labels import labels_of, pair

FOUR = [
    *labels_of(pair(1), ann="a", bob="a"),
    *labels_of(pair(2), ann="b", bob="b"),
    *labels_of(pair(3), ann="a", bob="b"),
    *labels_of(pair(4), ann="a", bob="a"),
]


def test_alpha_by_hand() -> None:
    """Eight values, five a and three b. Observed disagreement 2/8; expected 2·5·3/(8·7); α = 1 − 0.25/0.5357 = 8/15."""
    assert krippendorff_alpha(FOUR) == pytest.approx(8 / 15)
    skips = [*FOUR, *labels_of(pair(1), eve="skip"), *labels_of(pair(5), ann="tie", bob="skip")]
    assert krippendorff_alpha(skips) == pytest.approx(8 / 15), "a skip is missing, and one label compares with nothing"


@pytest.mark.parametrize(
    ("observers", "alpha"),
    [(["0100000010", "1110010000"], 0.095), (["123321412   ", "1233224125 3", " 3332342251 ", "12332441251 "], 0.743)],
    ids=["section A", "section C"],
)
def test_alpha_of_the_published_examples(observers: list[str], alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Krippendorff 2011: two observers and two values; four observers, five values, some of them missing."""
    monkeypatch.setattr(quality, "VALUED_CHOICES", tuple("012345"))
    labels = [
        Label(str(unit), str(observer), value, None)
        for observer, values in enumerate(observers)
        for unit, value in enumerate(values)
        if value != " "
    ]
    assert krippendorff_alpha(labels) == pytest.approx(alpha, abs=5e-4)


def test_alpha_is_that_of_nltk() -> None:
    labels, _ = crowd(30)
    data = [(label.labeller, label.question_id, label.choice) for label in labels]
    assert krippendorff_alpha(labels) == pytest.approx(AnnotationTask(data).alpha())


def test_alpha_of_nothing_to_compare_is_none() -> None:
    assert krippendorff_alpha([]) is None
    assert krippendorff_alpha(labels_of(pair(1), ann="a") + labels_of(pair(2), bob="b")) is None
    assert krippendorff_alpha(labels_of(pair(1), ann="a", bob="a")) is None, "one value cannot disagree by chance"


def test_raw_agreement_counts_pairs_of_labels() -> None:
    assert raw_agreement(FOUR) == Proportion(3, 4)
    assert raw_agreement(labels_of(pair(1), ann="a", bob="a", eve="b", joe="skip")) == Proportion(1, 3)
    assert raw_agreement([]).interval is None


def test_accuracy_on_gold_questions_has_wilsons_interval() -> None:
    asked = [pair(number, gold="a" if number < 10 else None) for number in range(12)]
    labels = [label for item in asked for label in labels_of(item, ann="b" if item in asked[:2] else "a", bob="skip")]
    found = gold_accuracy(labels, asked)
    assert found == {"ann": Proportion(8, 10)}
    interval: Any = found["ann"].interval
    assert (interval.low, interval.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # as R's prop.test, uncorrected


def test_order_bias_counts_what_was_seen_first() -> None:
    item = pair(1).id
    labels = [Label(item, "ann", choice, swapped=swapped) for choice in "ab" for swapped in (False, True, True)]
    assert first_position_rate([*labels, Label(item, "ann", "tie")]) == Proportion(1 + 2, 6)


def test_majority_is_the_share_of_votes() -> None:
    votes = labels_of(pair(1), ann="a", bob="a", eve="b", joe="skip")
    assert majority(votes) == {pair(1).id: {"a": pytest.approx(2 / 3), "b": pytest.approx(1 / 3)}}


def em(labels: Sequence[Label], rounds: int) -> dict[str, dict[str, float]]:
    """Dawid and Skene's algorithm, written from the paper's equations 2.3 to 2.5, from the shares of votes on."""
    items, people = (sorted({getattr(label, name) for label in labels}) for name in ("question_id", "labeller"))
    values = sorted({label.choice for label in labels})
    n = np.zeros((len(people), len(items), len(values)))
    for label in labels:
        n[people.index(label.labeller), items.index(label.question_id), values.index(label.choice)] += 1
    t = n.sum(0) / n.sum((0, 2))[:, None]
    for _ in range(rounds):
        pi = np.maximum(np.einsum("ij,kil->kjl", t, n), 1e-10)
        pi /= pi.sum(2, keepdims=True)
        likelihood = np.exp(np.einsum("kil,kjl->ij", n, np.log(pi))) * t.mean(0)
        t = likelihood / likelihood.sum(1, keepdims=True)
    return {item: dict(zip(values, row, strict=True)) for item, row in zip(items, t.tolist(), strict=True)}


def crowd(count: int) -> tuple[list[Label], dict[str, str]]:
    """Two careful labellers and one who guesses."""
    draw, labels, truth = random.Random(1), list[Label](), dict[str, str]()
    for number in range(count):
        item, right = pair(number), draw.choice("ab")
        truth[item.id] = right
        for name, accuracy in {"ann": 0.9, "bob": 0.9, "eve": 0.5}.items():
            wrong = "b" if right == "a" else "a"
            labels += labels_of(item, **{name: right if draw.random() < accuracy else wrong})
    return labels, truth


def test_dawid_skene_finds_who_is_good_as_an_independent_implementation_does() -> None:
    labels, truth = crowd(120)
    found, expected = dawid_skene(labels, {}), em(labels, EM_ITERATIONS)
    for item, row in found.items.items():
        assert row == pytest.approx(expected[item], abs=1e-6)
        assert sum(row.values()) == pytest.approx(1)
    right = sum(max(row, key=lambda choice: row[choice]) == truth[item] for item, row in found.items.items())
    assert right >= 100
    assert min(found.quality["ann"], found.quality["bob"]) > found.quality["eve"] + 0.2
    assert dawid_skene(labels[::-1], {}) == found, "the order of labels must not count"


def test_known_answers_are_certain() -> None:
    labels, truth = crowd(30)
    item = labels[0].question_id
    wrong = "b" if truth[item] == "a" else "a"
    assert dawid_skene(labels, {item: wrong}).items[item][wrong] == pytest.approx(1)
    assert dawid_skene(labels, {item: "both_bad"}).items == dawid_skene(labels, {}).items
    assert dawid_skene(labels_of(pair(1), ann="skip"), {}).items == {}


def test_without_the_packages_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "crowdkit.aggregation", None)
    with pytest.raises(ConfigError, match=r"needs the package crowd-kit: pip install -e '\.\[label\]'"):
        dawid_skene(FOUR, {})


GOLD = pair(9, gold="a")
ASKED = [pair(1, labels_wanted=2), pair(2, labels_wanted=2), pair(3), pair(4), GOLD]


LABELS = [
    Label(pair(1).id, "ann", "a", 2, seconds=4.0),
    Label(pair(2).id, "ann", "b", 3, seconds=8.0, swapped=True),
    Label(GOLD.id, "ann", "a", 1, seconds=12.0, swapped=True),
    Label(pair(1).id, "bob", "b"),
    Label(GOLD.id, "bob", "skip"),
    Label(pair(3).id, "bob", "tie"),
    Label(pair(1).id, "model:m", "a"),
]


def test_the_summary_by_hand() -> None:
    found = label_summary(ASKED, LABELS)
    assert (found.questions, found.labelled, found.labels) == (5, 4, 7)
    assert found.waiting == 1 + 1, "for the second and fourth question; the model's label is no person's"
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
    names = ("ann", "bob", "model:m")
    labels += [Label(item.id, name, item.gold or "") for item in tests for name in names]
    found = label_summary([*asked, *tests], labels)
    card = export_preferences([*asked, *tests], labels, aggregate="none").card
    assert found.agreement == Proportion(2, 4)
    assert found.alpha == pytest.approx(card["alpha_people"])
    assert found.alpha_all == pytest.approx(card["alpha"])
    assert (found.alpha or 0.0) < 0.2
    assert "leave out questions with a known answer" in " ".join(report_page(found).split())


def test_a_skip_leaves_a_question_waiting_as_it_does_for_the_page(store: LabelStore) -> None:
    store.add_questions([pair(1)])
    store.save_label(Label(pair(1).id, "ann", "skip"))
    found = label_summary(store.questions(), store.current_labels())
    assert (found.waiting, found.labelled) == (store.open_questions()[0], 0) == (1, 0)


GAPS = [
    ([], "it needs two, and there is none"),
    (labels_of(pair(1), ann="a") + labels_of(pair(2), ann="b"), "it needs two, and there is one"),
    (labels_of(pair(1), ann="a", bob="skip"), "it needs two, and there is one"),
    (labels_of(pair(1), ann="a") + labels_of(pair(2), bob="b"), "no question has the labels of two labellers"),
    (labels_of(pair(1), ann="a", bob="a") + labels_of(pair(2), bob="b"), "all labels that can be compared are equal"),
]


@pytest.mark.parametrize(("labels", "reason"), GAPS)
def test_where_there_is_no_alpha_the_report_says_why(labels: list[Label], reason: str) -> None:
    found = label_summary([pair(1), pair(2)], [*labels, *labels_of(pair(1), **{"model:m": "b"})])
    assert found.alpha is None
    assert found.alpha_gap is not None
    assert reason in found.alpha_gap
    assert f"There is no α of people: {found.alpha_gap}." in report_page(found)


def test_where_there_is_an_alpha_there_is_no_reason_for_none() -> None:
    found = label_summary([pair(number) for number in range(1, 5)], FOUR)
    assert (found.alpha is None, found.alpha_gap) == (False, None)
    assert "There is no α" not in report_page(found)


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
    page = report_page(label_summary(ASKED, LABELS))
    tags = Tags()
    tags.feed(page)
    assert (tags.open, tags.fetched) == ([], [])
    assert "http" not in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert page == report_page(label_summary(ASKED, LABELS[::-1])), "equal labels, equal bytes"
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
