"""The raters' own agreement, against counting by hand and against a plain loop."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tasks.core.rows import Rating
from tasks.data.rater_agreement import rater_agreement


def rated(*ratings: float) -> Rating:
    return Rating(id="x", text="x", ratings=ratings)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_by_hand() -> None:
    # Draw 0 (rest 1) or 1 (rest 0) from the first, 0 or 2 (rest 2 or 0) from the second.
    # (0, 0): tie, left out. (0, 2): drawn says second; rest 1 against 0 says first: no.
    # (1, 0): drawn says first; rest 0 against 2 says second: no. (1, 2): drawn says second; rest 0 against 0 ties: ½.
    assert rater_agreement(rated(0, 1), rated(0, 2), 1, rng()) == pytest.approx(0.5 / 3)


def test_raters_who_all_agree_agree() -> None:
    assert rater_agreement(rated(3, 3, 4), rated(-1, -2, 0), 1, rng()) == 1.0
    assert rater_agreement(rated(3, 3, 4, 3), rated(-1, -2, 0, 0), 2, rng()) == 1.0


def test_agreement_needs_other_raters_and_a_difference() -> None:
    assert rater_agreement(rated(3), rated(1, 2), 1, rng()) is None
    assert rater_agreement(rated(1, 1), rated(1, 1), 1, rng()) is None


def test_against_a_plain_loop_over_all_groups() -> None:
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
        found = rater_agreement(rated(*one), rated(*other), raters, rng())
        # One rater is exact; two are 400 random draws, with a standard error of at most ½/√400 = 0.025.
        assert found == pytest.approx(np.mean(scores), abs=1e-12 if raters == 1 else 0.1)
