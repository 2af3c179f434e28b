"""Pairs of rated texts, and labels for them: from single raters (noisy, as in training) or from all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from random import Random

from tasks.core.rows import Preference, Rating

__all__ = ["draw_pairs", "label_by_all", "label_by_raters"]

Pair = tuple[Rating, Rating]

_MAX_DRAWS = 20  # of raters for one label; sides that still tie are rated alike by nearly everyone


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
    return Preference(
        id=f"{chosen.id}>{rejected.id}",
        prompt="",
        chosen=chosen.text,
        rejected=rejected.text,
        margin=round(chosen.mean - rejected.mean, 6),
    )
