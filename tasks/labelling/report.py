"""What the labels are worth, as figures and as one self-contained page; equal labels give equal bytes."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.evals.report import load_template
from tasks.evals.statistics import Interval
from tasks.labelling.agreement import Share, alpha, dawid_skene, first_shown, gold_accuracy, raw_agreement
from tasks.labelling.labels import Label, Question, by_model
from tasks.labelling.tables import CHOICES

__all__ = ["LabellerRow", "Report", "figure", "percent", "report", "report_page", "share"]

SECONDS = (2, 5, 10, 20, 40, 80)
"""Upper ends of the histogram's bars; what takes longer has a bar of its own."""

SHOWN = 12
"""Of the questions on which labellers differ."""

STRENGTHS = {1: "slightly", 2: "clearly", 3: "far better"}


@dataclass(frozen=True)
class LabellerRow:
    """What is known of one labeller; `quality` is the mean posterior of their labels, see `dawid_skene`."""

    name: str
    labels: int
    skips: int
    alike: int
    gold: Share
    quality: float | None
    first: Share
    seconds: float | None


@dataclass(frozen=True)
class Report:
    """Everything that the page and the terminal show.

    Attributes:
        labelled: questions that have a label that is no skip.
        waiting: labels of people that are wanted still; a skip is none, as for whom the page asks.
        alpha, alpha_all, agreement: over questions without a known answer, as the card of an export counts them;
            `alpha_all` takes models for labellers, too, and is None without any.
    """

    questions: int
    labelled: int
    labels: int
    waiting: int
    alpha: float | None
    alpha_all: float | None
    agreement: Share
    first: Share
    labellers: tuple[LabellerRow, ...]
    choices: dict[str, int]
    strengths: dict[str, int]
    seconds: dict[str, int]
    disputed: tuple[tuple[Question, Mapping[str, float]], ...]


def report(questions: Sequence[Question], labels: Sequence[Label]) -> Report:
    """The figures; agreement and order bias are those of people where there are people's labels.

    Raises:
        ConfigError: a package of the extra `label` is missing.
    """
    people = [label for label in labels if not by_model(label.labeller)]
    asked = [item for item in questions if item.gold is None]
    compared, compared_people = _about(asked, labels), _about(asked, people)
    models = len(people) < len(labels)
    posterior = dawid_skene(labels, {item.id: item.gold for item in questions if item.gold})
    gold = gold_accuracy(labels, questions)
    names = sorted({label.labeller for label in labels}, key=lambda name: (by_model(name), name))
    counts = Counter(label.item for label in people if label.choice != "skip")
    return Report(
        questions=len(questions),
        labelled=len({label.item for label in labels if label.choice != "skip"}),
        labels=len(labels),
        waiting=sum(max(0, item.labels_wanted - counts[item.id]) for item in asked),
        alpha=alpha(compared_people),
        alpha_all=alpha(compared) if models else None,
        agreement=raw_agreement(compared_people),
        first=first_shown(people),
        labellers=tuple(_labeller(name, labels, gold, posterior.quality) for name in names),
        choices={choice: sum(label.choice == choice for label in labels) for choice in CHOICES},
        strengths={word: sum(label.strength == size for label in labels) for size, word in STRENGTHS.items()},
        seconds=_histogram([label.seconds for label in people if label.seconds is not None]),
        disputed=_disputed(questions, labels, posterior.items),
    )


def percent(value: float) -> str:
    """A share in percent."""
    return f"{value:.0%}"


def figure(value: float | None) -> str:
    """Two digits, or a dash."""
    return "–" if value is None else f"{value:.2f}"


def share(found: Share) -> str:
    """`80% (49–94), 8 of 10`, or a dash."""
    interval: Interval | None = found.interval
    if interval is None:
        return "–"
    return f"{interval.mean:.0%} ({100 * interval.low:.0f}–{100 * interval.high:.0f}), {found.hits} of {found.of}"


def report_page(found: Report) -> str:
    """The page."""
    filters: dict[str, Callable[..., str]] = {"percent": percent, "share": share, "figure": figure}
    page = load_template("report.html.j2", filters, autoescape=True, folder=Path(__file__).parent)
    charts = {
        "What was chosen": found.choices,
        "How much better": found.strengths,
        "Seconds per label": found.seconds,
    }
    return page.render(report=found, charts={name: bars for name, bars in charts.items() if sum(bars.values())})


def _labeller(
    name: str, labels: Sequence[Label], gold: Mapping[str, Share], quality: Mapping[str, float]
) -> LabellerRow:
    own = [label for label in labels if label.labeller == name]
    times = [label.seconds for label in own if label.seconds is not None]
    return LabellerRow(
        name=name,
        labels=len(own),
        skips=sum(label.choice == "skip" for label in own),
        alike=sum(label.choice in ("tie", "both_bad") for label in own),
        gold=gold.get(name, Share(0, 0)),
        quality=quality.get(name),
        first=first_shown([] if by_model(name) else own),
        seconds=statistics.median(times) if times else None,
    )


def _about(questions: Sequence[Question], labels: Sequence[Label]) -> list[Label]:
    """The labels of these questions."""
    ids = {item.id for item in questions}
    return [label for label in labels if label.item in ids]


def _histogram(seconds: Sequence[float]) -> dict[str, int]:
    edges = (0, *SECONDS)
    bars = {
        f"{low}–{high}": sum(low <= value < high for value in seconds)
        for low, high in zip(edges, SECONDS, strict=False)
    }
    return bars | {f"{SECONDS[-1]}+": sum(value >= SECONDS[-1] for value in seconds)}


def _disputed(
    questions: Sequence[Question], labels: Sequence[Label], posterior: Mapping[str, Mapping[str, float]]
) -> tuple[tuple[Question, Mapping[str, float]], ...]:
    """The questions on which labellers differ, the least certain first."""
    said: dict[str, set[str]] = {}
    for label in labels:
        if label.choice != "skip":
            said.setdefault(label.item, set()).add(label.choice)
    differ = [item for item in questions if len(said.get(item.id, ())) > 1]
    differ.sort(key=lambda item: (max(posterior[item.id].values()), item.id))
    return tuple((item, posterior[item.id]) for item in differ[:SHOWN])
