"""Labels as rows of the pipeline's preferences, and a card that says what became of every label."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from tasks.core.rows import Preference
from tasks.labelling.agreement import alpha, dawid_skene, majority, raw_agreement
from tasks.labelling.labels import Label, Question, by_model

__all__ = ["Aggregate", "Dataset", "dataset"]

Aggregate: TypeAlias = Literal["none", "majority", "dawid-skene"]

DIGITS = 6

_SIGN = {"a": 1, "b": -1}


@dataclass(frozen=True)
class Dataset:
    """Preferences, sorted by id, and the facts about them; neither holds a date, so equal labels are equal bytes.

    `left_out`: reason → labels, or questions where labels are aggregated, that gave no row.
    """

    rows: list[Preference]
    left_out: dict[str, int]
    card: dict[str, object]


def dataset(
    questions: Sequence[Question], labels: Sequence[Label], *, aggregate: Aggregate, names: Mapping[str, str]
) -> Dataset:
    """A preference for each label, or for each question what its labels say together.

    Questions that test labellers give none. Ties, pairs that are both bad, pairs with an empty response, and questions
    on which no choice has the most votes say nothing that a preference could: they are left out and counted. Labels
    that disagree are kept.

    Args:
        aggregate: `none`, every label is a row; `majority`, the most frequent choice and its share of the votes;
            `dawid-skene`, the most probable choice and its probability.
        names: labeller → what `labelled_by` says.
    """
    asked = {question.id: question for question in questions}
    tests = {question.id: question.gold for question in questions if question.gold}
    counted = [label for label in labels if label.item not in tests]
    left_out: Counter[str] = Counter({"gold": len(labels) - len(counted)})
    if aggregate == "none":
        rows = [row for label in counted if (row := _single(asked[label.item], label, names, left_out))]
    else:
        left_out["skip"] += sum(label.choice == "skip" for label in counted)
        shares = majority(counted) if aggregate == "majority" else _posterior(labels, tests)
        rows = _aggregated(asked, counted, shares, names, left_out)
    rows.sort(key=lambda row: row.id)
    missing = {reason: count for reason, count in sorted(left_out.items()) if count}
    return Dataset(rows, missing, {"aggregate": aggregate, **_card(asked, counted, rows, missing, names)})


def _posterior(labels: Sequence[Label], tests: Mapping[str, str]) -> dict[str, Mapping[str, float]]:
    """Answers to the test questions tell how good each labeller is, too."""
    items = dawid_skene(labels, tests).items
    return {item: row for item, row in items.items() if item not in tests}


def _single(question: Question, label: Label, names: Mapping[str, str], left_out: Counter[str]) -> Preference | None:
    who = names[label.labeller]
    margin = None if label.strength is None else float(label.strength)
    return _row(f"{question.id}/{who}", question, label.choice, left_out, margin=margin, labelled_by=(who,))


def _aggregated(
    asked: Mapping[str, Question],
    labels: Sequence[Label],
    shares: Mapping[str, Mapping[str, float]],
    names: Mapping[str, str],
    left_out: Counter[str],
) -> list[Preference]:
    of: dict[str, list[Label]] = defaultdict(list)
    for label in labels:
        if label.choice != "skip":
            of[label.item].append(label)
    rows = []
    for item, own in of.items():
        choice, share = _winner(shares[item])
        who = tuple(sorted({names[label.labeller] for label in own}))
        margin, confidence = _margin(own, choice), round(share, DIGITS)
        rows.append(_row(item, asked[item], choice, left_out, margin=margin, labelled_by=who, confidence=confidence))
    return [row for row in rows if row]


def _winner(shares: Mapping[str, float]) -> tuple[str, float]:
    """The choice of the largest share, `no_majority` where two have it."""
    best = max(shares.values())
    leading = [choice for choice, share in shares.items() if abs(share - best) < 1e-9]
    return (leading[0] if len(leading) == 1 else "no_majority"), best


def _margin(labels: Sequence[Label], choice: str) -> float | None:
    """Mean strength toward the chosen side over the labels, against it negative, that of a tie or both bad 0.

    Labels that prefer a side and do not say how much, as those of models, are left out; None if no label says it.
    """
    if choice not in _SIGN or all(label.strength is None for label in labels):
        return None
    known = [label for label in labels if label.strength is not None or label.choice not in _SIGN]
    signed = [_SIGN.get(label.choice, 0) * (label.strength or 0) for label in known]
    return round(_SIGN[choice] * sum(signed) / len(signed), DIGITS)


def _row(name: str, question: Question, choice: str, left_out: Counter[str], **rest: Any) -> Preference | None:
    if choice not in _SIGN:
        left_out[choice] += 1
        return None
    sides = (question.response_a, question.response_b)
    if not all(sides):  # an import let them in once, and a preference must not hold them
        left_out["empty_response"] += 1
        return None
    chosen, rejected = sides if choice == "a" else sides[::-1]
    return Preference(id=name, prompt=question.prompt, chosen=chosen, rejected=rejected, **rest)


def _card(
    asked: Mapping[str, Question],
    labels: Sequence[Label],
    rows: Sequence[Preference],
    left_out: Mapping[str, int],
    names: Mapping[str, str],
) -> dict[str, object]:
    choices = Counter(label.choice for label in labels)
    opinions: dict[str, set[str]] = defaultdict(set)
    for label in labels:
        if label.choice != "skip":
            opinions[label.item].add(label.choice)
    by = Counter(names[label.labeller] for label in labels)
    people = [label for label in labels if not by_model(label.labeller)]
    agreement = raw_agreement(labels)
    return {
        "rows": len(rows),
        "questions": sum(question.gold is None for question in asked.values()),
        "labelled": len(opinions),
        "disputed": sum(len(said) > 1 for said in opinions.values()),
        "labels": {"people": len(people), "models": len(labels) - len(people)},
        "choices": dict(sorted(choices.items())),
        "left_out": dict(left_out),
        "labelled_by": dict(sorted(by.items())),
        "alpha": _rounded(alpha(labels)),
        "alpha_people": _rounded(alpha(people)),
        "agreement": {"agree": agreement.hits, "of": agreement.of},
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)
