"""Export of labels as the pipeline's preferences, with a card that accounts for every label."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tasks.core.rows import Preference
from tasks.labelling.labels import Label, Question, is_model
from tasks.labelling.quality import count_votes, dawid_skene, krippendorff_alpha, majority, raw_agreement

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


def export_preferences(questions: Sequence[Question], labels: Sequence[Label], *, aggregate: Aggregate) -> ExportResult:
    """Return a preference for each label, or one for each question from all its labels.

    Questions that test labellers give none. Ties, pairs that are both bad, pairs with an empty response, and questions
    on which no choice has the most votes are no preference: they are dropped and counted. Labels that disagree are
    kept.

    Args:
        aggregate: `none`, every label is a row; `majority`, the most frequent choice and its share of the votes;
            `dawid-skene`, the most probable choice and its probability, where answers to test questions count, too.
    """
    asked = {question.id: question for question in questions}
    tests = {question.id: question.gold for question in questions if question.gold}
    counted = [label for label in labels if label.question_id not in tests]
    dropped: Counter[str] = Counter({"gold": len(labels) - len(counted)})
    rows: list[Preference | None] = []
    if aggregate == "none":
        for label in counted:
            name = f"{label.question_id}/{label.labeller}"
            rows.append(_row(name, asked[label.question_id], [label], label.choice, None, dropped))
    else:
        shares = majority(counted) if aggregate == "majority" else dawid_skene(labels, tests).items
        by_question: dict[str, list[Label]] = defaultdict(list)
        for label in counted:
            if label.choice != "skip":
                by_question[label.question_id].append(label)
        dropped["skip"] = sum(label.choice == "skip" for label in counted)
        rows += [_row(item, asked[item], own, *_top(shares[item]), dropped) for item, own in by_question.items()]
    kept = sorted((row for row in rows if row), key=lambda row: row.id)
    missing = {reason: count for reason, count in sorted(dropped.items()) if count}
    return ExportResult(kept, missing, {"aggregate": aggregate, "rows": len(kept)} | _card(asked, counted, missing))


def _top(shares: Mapping[str, float]) -> tuple[str, float]:
    """Return the choice of the largest share, `no_majority` where two have it, and the share."""
    best = max(shares.values())
    leading = [choice for choice, share in shares.items() if abs(share - best) < 1e-9]
    return (leading[0] if len(leading) == 1 else "no_majority"), round(best, DIGITS)


def _row(
    name: str, question: Question, own: Sequence[Label], choice: str, confidence: float | None, dropped: Counter[str]
) -> Preference | None:
    if choice not in CHOICE_SIGN:
        dropped[choice] += 1
        return None
    sides = (question.response_a, question.response_b)
    if not all(sides):  # a test question may have one, and a preference must not
        dropped["empty_response"] += 1
        return None
    chosen, rejected = sides if choice == "a" else sides[::-1]
    who = tuple(sorted({label.labeller for label in own}))
    read = tuple(sorted({label.guidelines for label in own if label.guidelines})) or None
    texts = {"id": name, "prompt": question.prompt, "chosen": chosen, "rejected": rejected}
    return Preference(**texts, margin=_margin(own, choice), labelled_by=who, confidence=confidence, guidelines=read)


def _margin(labels: Sequence[Label], choice: str) -> float | None:
    """Return the mean strength toward the chosen side: negative for the other side, 0 for a tie or both bad.

    Labels that prefer a side without a strength, as those of models, are left out; None if no label has one.
    """
    if all(label.strength is None for label in labels):
        return None
    known = [label for label in labels if label.strength is not None or label.choice not in CHOICE_SIGN]
    signed = [CHOICE_SIGN.get(label.choice, 0) * (label.strength or 0) for label in known]
    return round(CHOICE_SIGN[choice] * sum(signed) / len(signed), DIGITS)


def _card(asked: Mapping[str, Question], labels: Sequence[Label], dropped: Mapping[str, int]) -> dict[str, object]:
    votes = count_votes(labels)
    people = [label for label in labels if not is_model(label.labeller)]
    agreement = raw_agreement(labels)
    return {
        "questions": sum(question.gold is None for question in asked.values()),
        "labelled": len(votes),
        "disputed": sum(len(own) > 1 for own in votes.values()),
        "labels": {"people": len(people), "models": len(labels) - len(people)},
        "choices": dict(sorted(Counter(label.choice for label in labels).items())),
        "dropped": dict(dropped),
        "labelled_by": dict(sorted(Counter(label.labeller for label in labels).items())),
        "guidelines": dict(sorted(Counter(label.guidelines or "none" for label in labels).items())),
        "alpha": _rounded(krippendorff_alpha(labels)),
        "alpha_people": _rounded(krippendorff_alpha(people)),
        "agreement": {"agree": agreement.hits, "of": agreement.of},
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)
