"""Pairs of rated texts, labels for them (of single raters, noisy, or of all), and how far raters agree on them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from random import Random

import numpy as np

from tasks.core.rows import Preference, Rating

__all__ = ["Pair", "draw_pairs", "label_by_all", "label_by_raters", "rater_agreement"]

Pair = tuple[Rating, Rating]

_MAX_DRAWS = 20  # of raters for one label; sides that still tie are rated alike by nearly everyone
_SAMPLES = 400  # rater groups drawn per pair where not all of them can be listed
_EPSILON = 1e-9  # two means this close are equal: they are sums of a few small numbers


def draw_pairs(rows: Sequence[Rating], *, min_margin: float, rng: Random) -> Iterator[Pair]:
    """Draw random pairs whose mean ratings differ, by at least `min_margin` points.

    Drawn in rounds: in one round each text is in at most one pair, so that no text is used much more often than the
    others. No pair comes twice. Ends when a round finds no new one.
    """
    drawn: set[frozenset[str]] = set()
    before = -1
    while len(drawn) > before:
        before = len(drawn)
        yield from _draw_round(rows, min_margin, drawn, rng)


def _draw_round(rows: Sequence[Rating], min_margin: float, drawn: set[frozenset[str]], rng: Random) -> Iterator[Pair]:
    """Pair each text, in random order, with the next one that fits it; `drawn` grows by each pair."""
    waiting = rng.sample(rows, len(rows))
    means = {row.id: row.mean for row in waiting}
    while waiting:
        one = waiting.pop()
        for index in range(len(waiting) - 1, -1, -1):
            other = waiting[index]
            gap, names = abs(means[one.id] - means[other.id]), frozenset((one.id, other.id))
            if gap > 0 and gap >= min_margin and names not in drawn:
                del waiting[index]
                drawn.add(names)
                yield one, other
                break


def label_by_all(pair: Pair) -> Preference:
    """Label a pair by the mean of all raters, for evaluation."""
    one, other = pair
    return _preference(one, other) if one.mean > other.mean else _preference(other, one)


def label_by_raters(pair: Pair, raters: int, *, rng: Random, counts: Counter[str]) -> Preference | None:
    """Label a pair by the means of `raters` randomly drawn raters, as one annotation task would.

    The two sides have their own draws. Ties are drawn again, up to 20 times; both that and giving up are counted.
    """
    one, other = pair
    for _ in range(_MAX_DRAWS):
        gap = _sampled_mean(one, raters, rng) - _sampled_mean(other, raters, rng)
        if gap:
            chosen, rejected = (one, other) if gap > 0 else (other, one)
            counts["against_the_mean"] += chosen.mean < rejected.mean
            return _preference(chosen, rejected)
        counts["ties_drawn_again"] += 1
    counts["ties_given_up"] += 1
    return None


def _sampled_mean(row: Rating, raters: int, rng: Random) -> float:
    sample = rng.sample(row.ratings, min(raters, len(row.ratings)))
    return sum(sample) / len(sample)


def _preference(chosen: Rating, rejected: Rating) -> Preference:
    """The pair compares whole texts, which share no prompt."""
    name, margin = f"{chosen.id}>{rejected.id}", round(chosen.mean - rejected.mean, 6)
    return Preference(id=name, prompt="", chosen=chosen.text, rejected=rejected.text, margin=margin)


def rater_agreement(one: Rating, other: Rating, raters: int, rng: np.random.Generator) -> float | None:
    """Probability that `raters` people, drawn anew for each text, order the pair as the mean of the *others* does.

    Leave-one-out: those who were drawn do not count in the mean that they are compared with. Draws that tie say
    nothing and are left out, as they are when labels are drawn; where the others' means tie, agreement is one half.
    With one rater all combinations are listed, so the figure is exact. None if every draw ties or nobody is left over.
    """
    if len(one.ratings) <= raters or len(other.ratings) <= raters:
        return None
    drawn, rest = (np.subtract.outer(*side) if raters == 1 else np.subtract(*side)
                   for side in zip(_groups(one, raters, rng), _groups(other, raters, rng), strict=True))  # fmt: skip
    decided = np.abs(drawn) > _EPSILON
    if not decided.any():
        return None
    agree = np.where(np.abs(rest) <= _EPSILON, 0.5, np.sign(drawn) == np.sign(rest))
    return float(agree[decided].mean())


def _groups(row: Rating, raters: int, rng: np.random.Generator) -> Sequence[np.ndarray]:
    """Mean of each drawn group and mean of the raters outside it: every single rater, or random groups."""
    ratings = np.asarray(row.ratings)
    if raters == 1:
        return ratings, (ratings.sum() - ratings) / (len(ratings) - 1)
    order = rng.permuted(np.tile(ratings, (_SAMPLES, 1)), axis=1)
    return order[:, :raters].mean(axis=1), order[:, raters:].mean(axis=1)
