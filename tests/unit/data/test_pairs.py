"""Pairs use texts evenly; labels follow single raters in training and all of them elsewhere; raters agree by hand."""

import itertools
from collections import Counter
from itertools import islice
from random import Random

import numpy as np
import pytest
from numpy.random import default_rng

from tasks.core.rows import Rating
from tasks.data.pairs import draw_pairs, label_by_all, label_by_raters, rater_agreement


def rated(name: str, *ratings: float) -> Rating:
    return Rating(id=name, text=f"text {name}", ratings=ratings)


SPREAD = [rated(str(number), number / 10) for number in range(40)]


def test_pairs_differ_by_the_margin_and_none_comes_twice() -> None:
    pairs = list(islice(draw_pairs(SPREAD, min_margin=1.0, rng=Random(0)), 100))
    assert len(pairs) == 100
    assert all(abs(one.mean - other.mean) >= 1.0 for one, other in pairs)
    assert len({frozenset((one.id, other.id)) for one, other in pairs}) == 100


def test_each_text_is_used_once_before_any_is_used_again() -> None:
    pairs = list(islice(draw_pairs(SPREAD, min_margin=0.0, rng=Random(0)), 50))
    used = [[row.id for pair in part for row in pair] for part in (pairs[:20], pairs)]
    assert set(Counter(used[0]).values()) == {1}
    assert max(Counter(used[1]).values()) <= 3


def test_all_pairs_there_are_come_out_and_then_it_ends() -> None:
    rows = [rated("a", 0), rated("b", 1), rated("c", 2), rated("d", 2)]
    found = {frozenset((one.id, other.id)) for one, other in draw_pairs(rows, min_margin=0.0, rng=Random(3))}
    assert found <= {frozenset(pair) for pair in ("ab", "ac", "ad", "bc", "bd")}, "c and d are rated alike"
    assert len(found) >= 4
    assert not list(draw_pairs(rows, min_margin=2.5, rng=Random(0)))


def test_all_raters_together_choose_the_higher_mean() -> None:
    row = label_by_all((rated("low", -1, 2), rated("high", 1, 1)))
    assert (row.id, row.prompt, row.chosen, row.rejected) == ("high>low", "", "text high", "text low")
    assert row.margin == pytest.approx(1 - 0.5)


def test_single_raters_err_as_often_as_their_ratings_say() -> None:
    # One rater of {0, 0, 0, 3} against one of {1}: the noisy side wins in one of four draws.
    pair = (rated("noisy", 0, 0, 0, 3), rated("steady", 1))
    counts: Counter[str] = Counter()
    rng = Random(0)
    labels = [label_by_raters(pair, 1, rng=rng, counts=counts) for _ in range(4000)]
    wrong = sum(label is not None and label.chosen == "text noisy" for label in labels)
    # Standard deviation √(4000 · ¼ · ¾) = 27.4: within four of them.
    assert wrong == pytest.approx(1000, abs=110)
    assert counts["against_the_mean"] == wrong
    assert {label.margin for label in labels if label} == {0.25, -0.25}


def test_with_all_raters_drawn_the_label_is_the_mean() -> None:
    pair = (rated("noisy", 0, 0, 0, 3), rated("steady", 1, 1, 1, 1))
    labels = {label_by_raters(pair, 9, rng=Random(seed), counts=Counter()) for seed in range(20)}
    assert {label.chosen for label in labels if label} == {"text steady"}


def test_ties_are_drawn_again_and_given_up_when_there_is_nothing_else() -> None:
    counts: Counter[str] = Counter()
    assert label_by_raters((rated("a", 1, 1), rated("b", 1)), 1, rng=Random(0), counts=counts) is None
    assert counts == {"ties_drawn_again": 20, "ties_given_up": 1}
    counts.clear()
    rng = Random(0)
    labels = [label_by_raters((rated("a", 1, 2), rated("b", 1)), 1, rng=rng, counts=counts) for _ in range(1000)]
    assert all(label is not None and label.chosen == "text a" for label in labels)
    # Half of all draws tie, so one more draw is needed per label on average (standard deviation √2000 = 45).
    assert counts["ties_drawn_again"] == pytest.approx(1000, abs=180)


def agreement(one: tuple[float, ...], other: tuple[float, ...], raters: int = 1) -> float | None:
    return rater_agreement(rated("x", *one), rated("x", *other), raters, default_rng(0))


def test_the_agreement_of_raters_by_hand() -> None:
    # Draw 0 (rest 1) or 1 (rest 0) from the first, 0 or 2 (rest 2 or 0) from the second.
    # (0, 0): tie, left out. (0, 2): drawn says second; rest 1 against 0 says first: no.
    # (1, 0): drawn says first; rest 0 against 2 says second: no. (1, 2): drawn says second; rest 0 against 0 ties: ½.
    assert agreement((0, 1), (0, 2)) == pytest.approx(0.5 / 3)


def test_agreement_is_whole_where_all_agree_and_needs_other_raters_and_a_difference() -> None:
    assert agreement((3, 3, 4), (-1, -2, 0)) == 1.0
    assert agreement((3, 3, 4, 3), (-1, -2, 0, 0), raters=2) == 1.0
    assert agreement((3,), (1, 2)) is None
    assert agreement((1, 1), (1, 1)) is None


def test_agreement_against_a_plain_loop_over_all_groups() -> None:
    one, other = (2.0, 0.0, 1.0, 3.0, 1.0), (1.0, 1.0, -1.0, 2.0)
    for raters in (1, 2):
        scores = []
        for first in itertools.combinations(range(len(one)), raters):
            for second in itertools.combinations(range(len(other)), raters):
                drawn = np.mean([one[i] for i in first]) - np.mean([other[i] for i in second])
                rest_one = np.mean([one[i] for i in range(len(one)) if i not in first])
                rest = rest_one - np.mean([other[i] for i in range(len(other)) if i not in second])
                if abs(drawn) > 1e-9:
                    scores.append(0.5 if abs(rest) < 1e-9 else float((drawn > 0) == (rest > 0)))
        # One rater is exact; two are 400 random draws, with a standard error of at most ½/√400 = 0.025.
        assert agreement(one, other, raters) == pytest.approx(np.mean(scores), abs=1e-12 if raters == 1 else 0.1)
