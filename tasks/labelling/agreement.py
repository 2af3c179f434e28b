"""Agreement statistics: Krippendorff's α, accuracy on known answers, order bias, and aggregation of labels."""

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
from tasks.labelling.labels import VALUED_CHOICES, Label, Question

__all__ = [
    "DawidSkeneResult",
    "Proportion",
    "dawid_skene",
    "first_position_rate",
    "gold_accuracy",
    "krippendorff_alpha",
    "majority",
    "raw_agreement",
]

EM_ITERATIONS = 30
"""Of expectation–maximisation; with few labels for each question more of them only raise its confidence."""

EXTRA = "needs the package {}: pip install -e '.[label]'"


@dataclass(frozen=True)
class Proportion:
    """A number of hits among a number of trials, with a 95 % Wilson interval; None where there were no trials."""

    hits: int
    of: int

    @property
    def interval(self) -> Interval | None:
        return wilson_interval(self.hits / self.of, self.of) if self.of else None


@dataclass(frozen=True)
class DawidSkeneResult:
    """Posteriors of Dawid and Skene's model.

    Attributes:
        items: question → choice → probability.
        quality: labeller → mean probability of the labels that they gave.
    """

    items: Mapping[str, Mapping[str, float]]
    quality: Mapping[str, float]


def krippendorff_alpha(labels: Sequence[Label]) -> float | None:
    """Return Krippendorff's α, nominal, over VALUED_CHOICES: 1 − observed / expected disagreement; skips are missing.

    None where it is not defined: no question has two labels, or all of those agree on one and the same value.
    Source: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability".

    Raises:
        ConfigError: the package krippendorff is missing.
    """
    counts = [[votes[choice] for choice in VALUED_CHOICES] for votes in _votes(labels).values() if votes.total() > 1]
    if np.count_nonzero(np.sum(counts, axis=0)) < 2:
        return None
    try:
        import krippendorff
    except ImportError as error:
        raise ConfigError(f"Krippendorff's alpha {EXTRA.format('krippendorff')}") from error
    value = float(krippendorff.alpha(value_counts=np.array(counts), level_of_measurement="nominal"))
    return value if math.isfinite(value) else None


def raw_agreement(labels: Sequence[Label]) -> Proportion:
    """Return how many of all pairs of labels that two labellers gave one question agree."""
    agree = total = 0
    for votes in _votes(labels).values():
        agree += sum(math.comb(count, 2) for count in votes.values())
        total += math.comb(votes.total(), 2)
    return Proportion(agree, total)


def gold_accuracy(labels: Iterable[Label], questions: Iterable[Question]) -> dict[str, Proportion]:
    """Map each labeller to their right answers among those to questions with a known answer; a skip is no answer."""
    gold = {question.id: question.gold for question in questions if question.gold}
    right: dict[str, list[bool]] = defaultdict(list)
    for label in labels:
        if label.question_id in gold and label.choice != "skip":
            right[label.labeller].append(label.choice == gold[label.question_id])
    return {labeller: Proportion(sum(hits), len(hits)) for labeller, hits in sorted(right.items())}


def first_position_rate(labels: Iterable[Label]) -> Proportion:
    """Return how many of the labels that prefer one response prefer the one shown first; ½ is no bias."""
    decided = [(label.choice == "a") != label.swapped for label in labels if label.choice in ("a", "b")]
    return Proportion(sum(decided), len(decided))


def majority(labels: Sequence[Label]) -> dict[str, dict[str, float]]:
    """Map question → choice → share of its labels, skips left out."""
    return {
        item: {choice: count / votes.total() for choice, count in sorted(votes.items())}
        for item, votes in _votes(labels).items()
    }


def dawid_skene(labels: Sequence[Label], known: Mapping[str, str]) -> DawidSkeneResult:
    """Weigh labellers by how well they agree with the consensus, by expectation–maximisation.

    A maximum-likelihood estimate: with few labels for each question, or of a labeller, it is overconfident.
    Source: Dawid and Skene 1979, "Maximum likelihood estimation of observer error-rates using the EM algorithm".

    Args:
        known: question → right choice, where it is known.

    Raises:
        ConfigError: the package crowd-kit is missing.
    """
    rows = [(label.question_id, label.labeller, label.choice) for label in labels if label.choice != "skip"]
    if not rows:
        return DawidSkeneResult({}, {})
    probabilities = _fitted(sorted(rows), known)
    items = {str(item): {str(choice): float(p) for choice, p in row.items()} for item, row in probabilities.items()}
    own: dict[str, list[float]] = defaultdict(list)
    for item, labeller, choice in sorted(rows):
        own[labeller].append(items[item][choice])
    return DawidSkeneResult(items, {labeller: sum(values) / len(values) for labeller, values in sorted(own.items())})


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
        fitted = DawidSkene(n_iter=EM_ITERATIONS, tol=-math.inf).fit(data, pandas.Series(truth) if truth else None)
    return fitted.probas_.to_dict(orient="index")


def _votes(labels: Iterable[Label]) -> dict[str, Counter[str]]:
    votes: dict[str, Counter[str]] = {}
    for label in sorted(labels, key=lambda label: label.question_id):
        if label.choice != "skip":
            votes.setdefault(label.question_id, Counter())[label.choice] += 1
    return votes
