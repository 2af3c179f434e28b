"""Agreement of raters on which of two texts is better: the ceiling of a reward model's accuracy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tasks.core.rows import Rating

__all__ = ["rater_agreement"]

_SAMPLES = 400  # rater groups drawn per pair where not all of them can be listed
_EPSILON = 1e-9  # two means this close are equal: they are sums of a few small numbers


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
