"""Agreement, accuracy and aggregation against arithmetic by hand and an independent implementation."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence

import numpy as np
import pytest

from tasks.core.errors import ConfigError
from tasks.labelling.agreement import (
    EM_ITERATIONS,
    Proportion,
    dawid_skene,
    first_position_rate,
    gold_accuracy,
    krippendorff_alpha,
    majority,
    raw_agreement,
)
from tasks.labelling.labels import Label
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
    assert krippendorff_alpha(skips) == pytest.approx(8 / 15), (
        "a skip is a missing value, and one label compares with nothing"
    )


def test_alpha_of_nothing_to_compare_is_none() -> None:
    assert krippendorff_alpha([]) is None
    assert krippendorff_alpha(labels_of(pair(1), ann="a") + labels_of(pair(2), bob="b")) is None
    assert krippendorff_alpha(labels_of(pair(1), ann="a", bob="a")) is None, (
        "one value only: nothing could have disagreed by chance"
    )


def test_raw_agreement_counts_pairs_of_labels() -> None:
    assert raw_agreement(FOUR) == Proportion(3, 4)
    assert raw_agreement(labels_of(pair(1), ann="a", bob="a", eve="b", joe="skip")) == Proportion(1, 3)
    assert raw_agreement([]).interval is None


def test_accuracy_on_gold_questions_has_wilsons_interval() -> None:
    asked = [pair(number, gold="a" if number < 10 else None) for number in range(12)]
    labels = [label for item in asked for label in labels_of(item, ann="b" if item in asked[:2] else "a", bob="skip")]
    found = gold_accuracy(labels, asked)
    assert found == {"ann": Proportion(8, 10)}
    interval = found["ann"].interval
    assert interval is not None
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


def test_nothing_labelled_is_no_posterior() -> None:
    assert dawid_skene(labels_of(pair(1), ann="skip"), {}).items == {}


def test_without_the_packages_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "krippendorff", None)
    monkeypatch.setitem(sys.modules, "crowdkit.aggregation", None)
    with pytest.raises(ConfigError, match=r"needs the package krippendorff: pip install -e '\.\[label\]'"):
        krippendorff_alpha(FOUR)
    with pytest.raises(ConfigError, match="needs the package crowd-kit"):
        dawid_skene(FOUR, {})
