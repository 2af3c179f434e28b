"""How far labels can be trusted: agreement, accuracy on known answers, and what many labels say together."""

from __future__ import annotations

import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.core.errors import ConfigError
from tasks.evals.statistics import Interval, wilson_interval
from tasks.labelling.labels import Label, Question
from tasks.labelling.tables import CHOICES

__all__ = ["Posterior", "Share", "alpha", "dawid_skene", "first_shown", "gold_accuracy", "majority", "raw_agreement"]

OPINIONS = tuple(choice for choice in CHOICES if choice != "skip")
"""What counts as a value; a skip is a missing one."""

ROUNDS = 30
"""Of expectation–maximisation; with few labels for each question more of them only make it surer of itself."""

EXTRA = "needs the package {}: pip install -e '.[label]'"


@dataclass(frozen=True)
class Share:
    """How many of how many, with the share's 95 % Wilson interval; None where there were none."""

    hits: int
    of: int

    @property
    def interval(self) -> Interval | None:
        return wilson_interval(self.hits / self.of, self.of) if self.of else None


@dataclass(frozen=True)
class Posterior:
    """What all labels of a question say together.

    Attributes:
        items: question → choice → probability.
        quality: labeller → mean probability of the labels that they gave.
    """

    items: Mapping[str, Mapping[str, float]]
    quality: Mapping[str, float]


def alpha(labels: Sequence[Label]) -> float | None:
    """Krippendorff's α, nominal, over a, b, tie and both_bad: 1 − observed / expected disagreement; skips are missing.

    None where it is not defined: no question has two labels, or all of those agree on one and the same value.
    Source: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability".

    Raises:
        ConfigError: the package krippendorff is missing.
    """
    counts = [[votes[choice] for choice in OPINIONS] for votes in _votes(labels).values() if votes.total() > 1]
    if np.count_nonzero(np.sum(counts, axis=0)) < 2:
        return None
    try:
        import krippendorff
    except ImportError as error:
        raise ConfigError(f"Krippendorff's alpha {EXTRA.format('krippendorff')}") from error
    value = float(krippendorff.alpha(value_counts=np.array(counts), level_of_measurement="nominal"))
    return value if math.isfinite(value) else None


def raw_agreement(labels: Sequence[Label]) -> Share:
    """Of all pairs of labels that two labellers gave one question, how many agree."""
    agree = total = 0
    for votes in _votes(labels).values():
        agree += sum(math.comb(count, 2) for count in votes.values())
        total += math.comb(votes.total(), 2)
    return Share(agree, total)


def gold_accuracy(labels: Iterable[Label], questions: Iterable[Question]) -> dict[str, Share]:
    """Labeller → how many of the answers to questions with a known answer were right; a skip is no answer."""
    gold = {question.id: question.gold for question in questions if question.gold}
    right: dict[str, list[bool]] = defaultdict(list)
    for label in labels:
        if label.item in gold and label.choice != "skip":
            right[label.labeller].append(label.choice == gold[label.item])
    return {labeller: Share(sum(hits), len(hits)) for labeller, hits in sorted(right.items())}


def first_shown(labels: Iterable[Label]) -> Share:
    """Of the labels that prefer one response, how many prefer the one that was shown first; ½ is no bias."""
    decided = [(label.choice == "a") != label.swapped for label in labels if label.choice in ("a", "b")]
    return Share(sum(decided), len(decided))


def majority(labels: Sequence[Label]) -> dict[str, dict[str, float]]:
    """Question → choice → share of its labels, skips left out."""
    return {
        item: {choice: count / votes.total() for choice, count in sorted(votes.items())}
        for item, votes in _votes(labels).items()
    }


def dawid_skene(labels: Sequence[Label], known: Mapping[str, str]) -> Posterior:
    """Weigh labellers by how well they agree with what all of them say together, by expectation–maximisation.

    A maximum-likelihood estimate: with few labels for each question, or of a labeller, it is too sure of itself.
    Source: Dawid and Skene 1979, "Maximum likelihood estimation of observer error-rates using the EM algorithm".

    Args:
        known: question → right choice, where it is known.

    Raises:
        ConfigError: the package crowd-kit is missing.
    """
    rows = [(label.item, label.labeller, label.choice) for label in labels if label.choice != "skip"]
    if not rows:
        return Posterior({}, {})
    probabilities = _fitted(sorted(rows), known)
    items = {str(item): {str(choice): float(p) for choice, p in row.items()} for item, row in probabilities.items()}
    own: dict[str, list[float]] = defaultdict(list)
    for item, labeller, choice in sorted(rows):
        own[labeller].append(items[item][choice])
    return Posterior(items, {labeller: sum(values) / len(values) for labeller, values in sorted(own.items())})


def _fitted(rows: Sequence[tuple[str, str, str]], known: Mapping[str, str]) -> dict[Any, dict[Any, float]]:
    try:
        import pandas
        from crowdkit.aggregation import DawidSkene
    except ImportError as error:
        raise ConfigError(f"Dawid and Skene's aggregation {EXTRA.format('crowd-kit')}") from error
    data = pandas.DataFrame(rows, columns=["task", "worker", "label"])
    given = {choice for _, _, choice in rows}
    truth = {item: choice for item, choice in sorted(known.items()) if choice in given}
    with warnings.catch_warnings():  # crowd-kit 1.4 calls pandas 3 in ways that pandas is about to drop
        warnings.simplefilter("ignore", DeprecationWarning)
        fitted = DawidSkene(n_iter=ROUNDS, tol=-math.inf).fit(data, pandas.Series(truth) if truth else None)
    return fitted.probas_.to_dict(orient="index")


def _votes(labels: Iterable[Label]) -> dict[str, Counter[str]]:
    votes: dict[str, Counter[str]] = {}
    for label in sorted(labels, key=lambda label: label.item):
        if label.choice != "skip":
            votes.setdefault(label.item, Counter())[label.choice] += 1
    return votes
