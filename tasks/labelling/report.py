"""Label quality report, as numbers and as one self-contained page; equal labels give equal bytes."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.evals.report_text import load_template
from tasks.evals.statistics import Interval
from tasks.labelling.agreement import (
    Proportion,
    dawid_skene,
    first_position_rate,
    gold_accuracy,
    krippendorff_alpha,
    raw_agreement,
)
from tasks.labelling.labels import CHOICES, Label, Question, is_model

__all__ = ["LabelSummary", "LabellerRow", "format_number", "format_proportion", "label_summary", "report_page"]

SECONDS_EDGES = (2, 5, 10, 20, 40, 80)
"""Upper ends of the histogram's bars; what takes longer has a bar of its own."""

MAX_DISPUTED = 12
"""Questions on which labellers differ."""

STRENGTHS = {1: "slightly", 2: "clearly", 3: "far better"}


@dataclass(frozen=True)
class LabellerRow:
    """Statistics of one labeller; `quality` is the mean posterior of their labels, see `dawid_skene`."""

    name: str
    labels: int
    skips: int
    ties: int
    gold: Proportion
    quality: float | None
    first: Proportion
    seconds: float | None


@dataclass(frozen=True)
class LabelSummary:
    """Everything that the page and the terminal show.

    Attributes:
        labelled: questions that have a label that is no skip.
        waiting: labels of people that are still wanted; a skip is none, so the page asks somebody else.
        alpha, alpha_all, agreement: over questions without a known answer, as the card of an export counts them;
            `alpha_all` counts models as labellers, too, and is None without any.
    """

    questions: int
    labelled: int
    labels: int
    waiting: int
    alpha: float | None
    alpha_all: float | None
    agreement: Proportion
    first: Proportion
    labellers: tuple[LabellerRow, ...]
    choices: dict[str, int]
    strengths: dict[str, int]
    seconds: dict[str, int]
    disputed: tuple[tuple[Question, Mapping[str, float]], ...]


def label_summary(questions: Sequence[Question], labels: Sequence[Label]) -> LabelSummary:
    """Compute the summary; agreement and order bias are those of people.

    Raises:
        ConfigError: a package of the extra `label` is missing.
    """
    people = [label for label in labels if not is_model(label.labeller)]
    asked = [item for item in questions if item.gold is None]
    compared, compared_people = _labels_of(asked, labels), _labels_of(asked, people)
    models = len(people) < len(labels)
    posterior = dawid_skene(labels, {item.id: item.gold for item in questions if item.gold})
    gold = gold_accuracy(labels, questions)
    names = sorted({label.labeller for label in labels}, key=lambda name: (is_model(name), name))
    counts = Counter(label.question_id for label in people if label.choice != "skip")
    return LabelSummary(
        questions=len(questions),
        labelled=len({label.question_id for label in labels if label.choice != "skip"}),
        labels=len(labels),
        waiting=sum(max(0, item.labels_wanted - counts[item.id]) for item in asked),
        alpha=krippendorff_alpha(compared_people),
        alpha_all=krippendorff_alpha(compared) if models else None,
        agreement=raw_agreement(compared_people),
        first=first_position_rate(people),
        labellers=tuple(_labeller(name, labels, gold, posterior.quality) for name in names),
        choices={choice: sum(label.choice == choice for label in labels) for choice in CHOICES},
        strengths={word: sum(label.strength == size for label in labels) for size, word in STRENGTHS.items()},
        seconds=_histogram([label.seconds for label in people if label.seconds is not None]),
        disputed=_disputed(questions, labels, posterior.items),
    )


def format_number(value: float | None) -> str:
    """Format with two digits, or as a dash."""
    return "–" if value is None else f"{value:.2f}"


def format_proportion(found: Proportion) -> str:
    """Format as `80% (49–94), 8 of 10`, or as a dash."""
    interval: Interval | None = found.interval
    if interval is None:
        return "–"
    return f"{interval.mean:.0%} ({100 * interval.low:.0f}–{100 * interval.high:.0f}), {found.hits} of {found.of}"


def report_page(summary: LabelSummary) -> str:
    """Render the page."""
    filters: dict[str, Callable[..., str]] = {"percent": "{:.0%}".format, "share": format_proportion}
    filters["number"] = format_number
    page = load_template("report.html.j2", filters, autoescape=True, folder=Path(__file__).parent)
    charts = {"Choices": summary.choices, "Strength": summary.strengths, "Seconds per label": summary.seconds}
    return page.render(report=summary, charts={name: bars for name, bars in charts.items() if sum(bars.values())})


def _labeller(
    name: str, labels: Sequence[Label], gold: Mapping[str, Proportion], quality: Mapping[str, float]
) -> LabellerRow:
    own = [label for label in labels if label.labeller == name]
    times = [label.seconds for label in own if label.seconds is not None]
    return LabellerRow(
        name=name,
        labels=len(own),
        skips=sum(label.choice == "skip" for label in own),
        ties=sum(label.choice in ("tie", "both_bad") for label in own),
        gold=gold.get(name, Proportion(0, 0)),
        quality=quality.get(name),
        first=first_position_rate([] if is_model(name) else own),
        seconds=statistics.median(times) if times else None,
    )


def _labels_of(questions: Sequence[Question], labels: Sequence[Label]) -> list[Label]:
    ids = {item.id for item in questions}
    return [label for label in labels if label.question_id in ids]


def _histogram(seconds: Sequence[float]) -> dict[str, int]:
    edges = (0, *SECONDS_EDGES)
    bars = {
        f"{low}–{high}": sum(low <= value < high for value in seconds)
        for low, high in zip(edges, SECONDS_EDGES, strict=False)
    }
    return bars | {f"{SECONDS_EDGES[-1]}+": sum(value >= SECONDS_EDGES[-1] for value in seconds)}


def _disputed(
    questions: Sequence[Question], labels: Sequence[Label], posterior: Mapping[str, Mapping[str, float]]
) -> tuple[tuple[Question, Mapping[str, float]], ...]:
    """Return the questions on which labellers differ, the least certain first."""
    choices: dict[str, set[str]] = {}
    for label in labels:
        if label.choice != "skip":
            choices.setdefault(label.question_id, set()).add(label.choice)
    differ = [item for item in questions if len(choices.get(item.id, ())) > 1]
    differ.sort(key=lambda item: (max(posterior[item.id].values()), item.id))
    return tuple((item, posterior[item.id]) for item in differ[:MAX_DISPUTED])
