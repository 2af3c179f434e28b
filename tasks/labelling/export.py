"""Export of labels as the pipeline's preferences, with a card that accounts for every label."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from tasks.core.rows import Preference
from tasks.labelling.labels import Label, Question, is_model
from tasks.labelling.quality import dawid_skene, krippendorff_alpha, majority, raw_agreement

__all__ = ["Aggregate", "ExportResult", "export_preferences"]

Aggregate: TypeAlias = Literal["none", "majority", "dawid-skene"]

DIGITS = 6

CHOICE_SIGN = {"a": 1, "b": -1}


@dataclass(frozen=True)
class ExportResult:
    """Preferences, sorted by id, and a card; neither holds a date, so equal labels are equal bytes.

    `dropped`: reason → labels, or questions where labels are aggregated, that gave no row.
    """

    rows: list[Preference]
    dropped: dict[str, int]
    card: dict[str, object]


def export_preferences(
    questions: Sequence[Question], labels: Sequence[Label], *, aggregate: Aggregate, names: Mapping[str, str]
) -> ExportResult:
    """Return a preference for each label, or one for each question from all its labels.

    Questions that test labellers give none. Ties, pairs that are both bad, pairs with an empty response, and questions
    on which no choice has the most votes are no preference: they are dropped and counted. Labels that disagree are
    kept.

    Args:
        aggregate: `none`, every label is a row; `majority`, the most frequent choice and its share of the votes;
            `dawid-skene`, the most probable choice and its probability.
        names: labeller → what `labelled_by` says.
    """
    asked = {question.id: question for question in questions}
    tests = {question.id: question.gold for question in questions if question.gold}
    counted = [label for label in labels if label.question_id not in tests]
    dropped: Counter[str] = Counter({"gold": len(labels) - len(counted)})
    if aggregate == "none":
        rows = [row for label in counted if (row := _single(asked[label.question_id], label, names, dropped))]
    else:
        dropped["skip"] += sum(label.choice == "skip" for label in counted)
        shares = majority(counted) if aggregate == "majority" else _posterior(labels, tests)
        rows = _aggregated(asked, counted, shares, names, dropped)
    rows.sort(key=lambda row: row.id)
    missing = {reason: count for reason, count in sorted(dropped.items()) if count}
    return ExportResult(rows, missing, {"aggregate": aggregate, **_card(asked, counted, rows, missing, names)})


def _posterior(labels: Sequence[Label], tests: Mapping[str, str]) -> dict[str, Mapping[str, float]]:
    """Return posteriors of the other questions; answers to test questions inform the labellers' quality, too."""
    items = dawid_skene(labels, tests).items
    return {item: row for item, row in items.items() if item not in tests}


def _single(question: Question, label: Label, names: Mapping[str, str], dropped: Counter[str]) -> Preference | None:
    who = names[label.labeller]
    margin = None if label.strength is None else float(label.strength)
    return _row(f"{question.id}/{who}", question, label.choice, dropped, margin=margin, labelled_by=(who,))


def _aggregated(
    asked: Mapping[str, Question],
    labels: Sequence[Label],
    shares: Mapping[str, Mapping[str, float]],
    names: Mapping[str, str],
    dropped: Counter[str],
) -> list[Preference]:
    by_question: dict[str, list[Label]] = defaultdict(list)
    for label in labels:
        if label.choice != "skip":
            by_question[label.question_id].append(label)
    rows = []
    for item, own in by_question.items():
        choice, share = _top_choice(shares[item])
        who = tuple(sorted({names[label.labeller] for label in own}))
        margin, confidence = _margin(own, choice), round(share, DIGITS)
        rows.append(_row(item, asked[item], choice, dropped, margin=margin, labelled_by=who, confidence=confidence))
    return [row for row in rows if row]


def _top_choice(shares: Mapping[str, float]) -> tuple[str, float]:
    """Return the choice of the largest share, `no_majority` where two have it."""
    best = max(shares.values())
    leading = [choice for choice, share in shares.items() if abs(share - best) < 1e-9]
    return (leading[0] if len(leading) == 1 else "no_majority"), best


def _margin(labels: Sequence[Label], choice: str) -> float | None:
    """Return the mean strength toward the chosen side: negative for the other side, 0 for a tie or both bad.

    Labels that prefer a side without a strength, as those of models, are left out; None if no label has one.
    """
    if choice not in CHOICE_SIGN or all(label.strength is None for label in labels):
        return None
    known = [label for label in labels if label.strength is not None or label.choice not in CHOICE_SIGN]
    signed = [CHOICE_SIGN.get(label.choice, 0) * (label.strength or 0) for label in known]
    return round(CHOICE_SIGN[choice] * sum(signed) / len(signed), DIGITS)


def _row(name: str, question: Question, choice: str, dropped: Counter[str], **rest: Any) -> Preference | None:
    if choice not in CHOICE_SIGN:
        dropped[choice] += 1
        return None
    sides = (question.response_a, question.response_b)
    if not all(sides):  # a test question may have one, and a preference must not
        dropped["empty_response"] += 1
        return None
    chosen, rejected = sides if choice == "a" else sides[::-1]
    return Preference(id=name, prompt=question.prompt, chosen=chosen, rejected=rejected, **rest)


def _card(
    asked: Mapping[str, Question],
    labels: Sequence[Label],
    rows: Sequence[Preference],
    dropped: Mapping[str, int],
    names: Mapping[str, str],
) -> dict[str, object]:
    choices = Counter(label.choice for label in labels)
    choices_by_question: dict[str, set[str]] = defaultdict(set)
    for label in labels:
        if label.choice != "skip":
            choices_by_question[label.question_id].add(label.choice)
    by = Counter(names[label.labeller] for label in labels)
    people = [label for label in labels if not is_model(label.labeller)]
    agreement = raw_agreement(labels)
    return {
        "rows": len(rows),
        "questions": sum(question.gold is None for question in asked.values()),
        "labelled": len(choices_by_question),
        "disputed": sum(len(own) > 1 for own in choices_by_question.values()),
        "labels": {"people": len(people), "models": len(labels) - len(people)},
        "choices": dict(sorted(choices.items())),
        "dropped": dict(dropped),
        "labelled_by": dict(sorted(by.items())),
        "alpha": _rounded(krippendorff_alpha(labels)),
        "alpha_people": _rounded(krippendorff_alpha(people)),
        "agreement": {"agree": agreement.hits, "of": agreement.of},
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)
