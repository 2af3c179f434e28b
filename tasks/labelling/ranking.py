"""Ranking of policies by people's labels: win rate against SFT, and Elo points by the model of Bradley and Terry.

Only labels of people count, of pairs that two policies wrote, without known answer. A tie, and a pair that is both bad,
is half a win for each. Prompts are resampled for the intervals, because the labels of one prompt are alike.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse.csgraph import connected_components

from tasks.evals.statistics import LEVEL, Interval
from tasks.labelling.labels import Label, Question, is_model

__all__ = ["RankedPolicy", "elo_ratings", "rank_policies"]

REFERENCE = "sft"
SAMPLES, SEED = 500, 0
ELO = 400 / math.log(10)
"""Points per unit of log-odds: 400 points are odds of ten to one."""

SHARES = {"a": 1.0, "b": 0.0, "tie": 0.5, "both_bad": 0.5}
"""Choice → what the policy that wrote `a` wins."""


@dataclass(frozen=True)
class RankedPolicy:
    """What people say of a policy.

    Attributes:
        comparisons: labels of its pairs with other policies.
        win_rate: against SFT; None where the two never met.
        elo: points above SFT. ±∞ where labels bound it on one side alone: it never lost, or never won, on any way to
            SFT. None where nothing connects the two.
    """

    policy: str
    comparisons: int
    win_rate: Interval | None
    elo: Interval | None


def rank_policies(questions: Sequence[Question], labels: Sequence[Label]) -> tuple[RankedPolicy, ...]:
    """Rank the policies, the best first, those without a rank last; empty where no two met."""
    names, wins = _wins_by_prompt(questions, labels)
    if not names:
        return ()
    rng, total = np.random.default_rng(SEED), wins.sum(0)
    resampled = [wins[rng.integers(len(wins), size=len(wins))].sum(0) for _ in range(SAMPLES)]
    base = names.index(REFERENCE) if REFERENCE in names else 0
    ratings, spread = elo_ratings(total, base), np.array([elo_ratings(drawn, base) for drawn in resampled])
    rows = []
    for place, name in enumerate(names):
        met = total[place, base] + total[base, place] if names[base] == REFERENCE else 0
        shares = [_share(drawn[place, base], drawn[base, place]) for drawn in resampled]
        rows.append(
            RankedPolicy(
                policy=name,
                comparisons=int(total[place].sum() + total[:, place].sum()),
                win_rate=_interval(total[place, base] / met, np.array(shares)) if met else None,
                elo=None if np.isnan(ratings[place]) else _interval(ratings[place], spread[:, place]),
            )
        )
    return tuple(sorted(rows, key=lambda row: (-row.elo.mean if row.elo else math.inf, row.policy)))


def elo_ratings(wins: np.ndarray, base: int) -> np.ndarray:
    """Elo points [K] above policy `base` from wins [K, K] of row over column: the maximum-likelihood strengths.

    P(i beats j) = 1 / (1 + 10^((R_j − R_i) / 400)). They are finite among policies of which each has beaten each other
    one, directly or by way of others; beyond those they are ±∞, or NaN where the wins say nothing.

    Sources: Bradley and Terry 1952, "Rank analysis of incomplete block designs I", Biometrika 39; Ford 1957, "Solution
    of a ranking problem from binary comparisons", Am. Math. Monthly 64 (when they are finite).
    """
    beats = wins > 0
    _, groups = connected_components(beats, directed=True, connection="strong")
    ways = np.linalg.matrix_power(beats + np.eye(len(wins)), len(wins)) > 0
    up, down = ways[:, base], ways[base]
    ratings = np.where(up & ~down, np.inf, np.where(down & ~up, -np.inf, np.nan))
    inside = np.flatnonzero(groups == groups[base])
    ratings[inside] = 0.0
    if len(inside) > 1:
        strengths = _strengths(wins[np.ix_(inside, inside)])
        ratings[inside] = ELO * (strengths - strengths[inside == base])
    return ratings


def _strengths(wins: np.ndarray) -> np.ndarray:
    """Log-strengths [K] up to a constant, by logistic regression on who played: +1 the winner, −1 the loser."""
    from sklearn.linear_model import LogisticRegression  # its import takes a second, which other commands need not wait

    winners, losers = np.nonzero(wins)
    players = np.eye(len(wins))[winners] - np.eye(len(wins))[losers]
    weights = np.tile(wins[winners, losers], 2)
    outcomes = np.repeat([1, 0], len(players))
    model = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=1000)
    strengths: np.ndarray = model.fit(np.concatenate([players, -players]), outcomes, weights).coef_[0]
    return strengths


def _wins_by_prompt(questions: Sequence[Question], labels: Sequence[Label]) -> tuple[list[str], np.ndarray]:
    """Names of the policies, and for each prompt the wins [prompts, K, K] of row over column."""
    pairs = {item.id: item for item in questions if item.gold is None and item.policy_a != item.policy_b}
    votes = [
        (pairs[label.question_id], SHARES[label.choice])
        for label in labels
        if label.question_id in pairs and label.choice in SHARES and not is_model(label.labeller)
    ]
    names = sorted({name for item, _ in votes for name in (item.policy_a, item.policy_b)})
    place = {name: number for number, name in enumerate(names)}
    by_prompt: dict[str, np.ndarray] = defaultdict(lambda: np.zeros((len(names), len(names))))
    for item, share in votes:
        one, other = place[item.policy_a], place[item.policy_b]
        by_prompt[item.prompt][one, other] += share
        by_prompt[item.prompt][other, one] += 1 - share
    return names, np.array([by_prompt[prompt] for prompt in sorted(by_prompt)])


def _share(won: float, lost: float) -> float:
    return won / (won + lost) if won + lost else math.nan


def _interval(mean: float, drawn: np.ndarray) -> Interval:
    """Percentiles of the resamples in which there is a value; infinite ones cannot be interpolated."""
    known = drawn[~np.isnan(drawn)]
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return Interval(float(mean), float(low), float(high))
