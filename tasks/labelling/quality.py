"""Label quality: agreement, accuracy on known answers, order bias, aggregated labels, and a report of them all.

Equal labels give a report of equal bytes.
"""

import math
import statistics
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from tasks.core.errors import ConfigError
from tasks.evals.report_text import load_template
from tasks.evals.statistics import Interval, wilson_interval
from tasks.labelling.labels import CHOICES, VALUED_CHOICES, Label, Question, is_model
from tasks.labelling.ranking import RankedPolicy, rank_policies

__all__ = [
    "LabelSummary", "Proportion", "alpha_gap", "count_votes", "dawid_skene", "first_position_rate", "format_interval",
    "format_number", "format_proportion", "gold_accuracy", "krippendorff_alpha", "label_summary", "majority",
    "raw_agreement", "report_page",
]  # fmt: skip

EM_ITERATIONS = 30
"""Of expectation–maximisation; with few labels for each question more of them only raise its confidence."""

SECONDS_EDGES = (2, 5, 10, 20, 40, 80)
"""Upper ends of the histogram's bars; what takes longer has a bar of its own."""

MAX_DISPUTED = 12
STRENGTHS = {1: "slightly", 2: "clearly", 3: "far better"}


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
    """Posteriors: question → choice → probability; labeller → mean probability of the labels that they gave."""

    items: Mapping[str, Mapping[str, float]]
    quality: Mapping[str, float]


def krippendorff_alpha(labels: Sequence[Label]) -> float | None:
    """Return Krippendorff's α, nominal, over VALUED_CHOICES: 1 − observed / expected disagreement; skips are missing.

    None where it is not defined: no question has two labels, or all of those have one and the same value.
    Source: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", sections A to C.
    """
    voted = [votes for votes in count_votes(labels).values() if votes.total() > 1]
    counts = np.array([[votes[choice] for choice in VALUED_CHOICES] for votes in voted])
    if np.count_nonzero(counts.sum(axis=0)) < 2:
        return None
    voters, values = counts.sum(axis=1), counts.sum(axis=0)
    total = voters.sum()
    observed = ((voters**2 - (counts**2).sum(axis=1)) / (voters - 1)).sum() / total
    expected = (total**2 - (values**2).sum()) / (total * (total - 1))
    return float(1 - observed / expected)


def alpha_gap(labels: Sequence[Label]) -> str | None:
    """Return why `krippendorff_alpha` is not defined for these labels, skips left out; None where it is."""
    given = [label for label in labels if label.choice != "skip"]
    votes = [own for own in count_votes(given).values() if own.total() > 1]
    if (labellers := len({label.labeller for label in given})) < 2:
        return f"it compares labellers, so it needs two, and there is {'one' if labellers else 'none'}"
    if not votes:
        return (
            "no question has the labels of two labellers: `rlhf label sample --overlap 0.2` gives some questions to two"
        )
    return None if len({choice for own in votes for choice in own}) > 1 else "all labels that can be compared are equal"


def raw_agreement(labels: Sequence[Label]) -> Proportion:
    """Return how many of all pairs of labels that two labellers gave one question agree."""
    agree = total = 0
    for votes in count_votes(labels).values():
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
        for item, votes in count_votes(labels).items()
    }


def dawid_skene(labels: Sequence[Label], known: Mapping[str, str]) -> DawidSkeneResult:
    """Weigh labellers by how well they agree with the consensus, by expectation–maximisation.

    With few labels for each question, or of a labeller, this maximum-likelihood estimate is overconfident.
    Source: Dawid and Skene 1979, "Maximum likelihood estimation of observer error-rates using the EM algorithm".

    Args:
        known: question → right choice, where it is known.
    """
    rows = sorted((label.question_id, label.labeller, label.choice) for label in labels if label.choice != "skip")
    items = _posterior(rows, known) if rows else {}
    own: dict[str, list[float]] = defaultdict(list)
    for item, labeller, choice in rows:
        own[labeller].append(items[item][choice])
    return DawidSkeneResult(items, {labeller: sum(values) / len(values) for labeller, values in sorted(own.items())})


def _posterior(rows: Sequence[tuple[str, str, str]], known: Mapping[str, str]) -> dict[str, dict[str, float]]:
    try:
        import pandas
        from crowdkit.aggregation import DawidSkene
    except ImportError as error:
        message = "Dawid and Skene's aggregation needs the package crowd-kit: pip install -e '.[label]'"
        raise ConfigError(message) from error
    data = pandas.DataFrame(rows, columns=["task", "worker", "label"])
    given = {choice for _, _, choice in rows}
    truth = {item: choice for item, choice in sorted(known.items()) if choice in given}
    with warnings.catch_warnings():  # crowd-kit 1.4 calls pandas 3 in ways that pandas is about to drop
        warnings.simplefilter("ignore", DeprecationWarning)
        fitted = DawidSkene(n_iter=EM_ITERATIONS, tol=-math.inf).fit(data, pandas.Series(truth) if truth else None)
    probabilities: dict[str, dict[str, float]] = fitted.probas_.to_dict(orient="index")
    return probabilities


def count_votes(labels: Iterable[Label]) -> dict[str, Counter[str]]:
    """Map question → choice → number of its labels, skips left out; questions by id."""
    votes: dict[str, Counter[str]] = {}
    for label in sorted(labels, key=lambda label: label.question_id):
        if label.choice != "skip":
            votes.setdefault(label.question_id, Counter())[label.choice] += 1
    return votes


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
        waiting: labels of people that are still wanted; a skip is none, so somebody else is asked.
        alpha, alpha_all, agreement: over questions without a known answer; `alpha_all` counts models, too, and is None
            without any.
        alpha_gap: why there is no `alpha`.
        ranking: of the policies that wrote the responses; see `tasks.labelling.ranking`.
        disputed: questions on which labellers differ and their posteriors, the least certain first.
    """

    questions: int
    labelled: int
    labels: int
    waiting: int
    alpha: float | None
    alpha_gap: str | None
    alpha_all: float | None
    agreement: Proportion
    first: Proportion
    labellers: tuple[LabellerRow, ...]
    choices: dict[str, int]
    strengths: dict[str, int]
    seconds: dict[str, int]
    ranking: tuple[RankedPolicy, ...]
    disputed: tuple[tuple[Question, Mapping[str, float]], ...]


def label_summary(questions: Sequence[Question], labels: Sequence[Label]) -> LabelSummary:
    """Compute the summary; agreement and order bias are those of people."""
    people = [label for label in labels if not is_model(label.labeller)]
    wanted = {item.id: item.labels_wanted for item in questions if item.gold is None}
    compared = [label for label in labels if label.question_id in wanted]
    compared_people = [label for label in people if label.question_id in wanted]
    votes = count_votes(labels)
    posterior = dawid_skene(labels, {item.id: item.gold for item in questions if item.gold})
    gold = gold_accuracy(labels, questions)
    names = sorted({label.labeller for label in labels}, key=lambda name: (is_model(name), name))
    counts = Counter(label.question_id for label in people if label.choice != "skip")
    disputed = [item for item in questions if len(votes.get(item.id, ())) > 1]
    disputed.sort(key=lambda item: (max(posterior.items[item.id].values()), item.id))
    return LabelSummary(
        questions=len(questions),
        labelled=len(votes),
        labels=len(labels),
        waiting=sum(max(0, number - counts[item]) for item, number in wanted.items()),
        alpha=krippendorff_alpha(compared_people),
        alpha_gap=alpha_gap(compared_people),
        alpha_all=krippendorff_alpha(compared) if len(people) < len(labels) else None,
        agreement=raw_agreement(compared_people),
        first=first_position_rate(people),
        labellers=tuple(_labeller(name, labels, gold, posterior.quality) for name in names),
        choices={choice: sum(label.choice == choice for label in labels) for choice in CHOICES},
        strengths={word: sum(label.strength == size for label in labels) for size, word in STRENGTHS.items()},
        seconds=_histogram([label.seconds for label in people if label.seconds is not None]),
        ranking=rank_policies(questions, labels),
        disputed=tuple((item, posterior.items[item.id]) for item in disputed[:MAX_DISPUTED]),
    )


def format_number(value: float | None) -> str:
    """Format with two digits, or as a dash."""
    return "–" if value is None else f"{value:.2f}"


def format_interval(found: Interval | None, form: str) -> str:
    """Format as `400 (210 – 650)`, or as a dash."""
    if found is None:
        return "–"
    mean, low, high = (form.format(value).replace("inf", "∞") for value in (found.mean, found.low, found.high))
    return f"{mean} ({low} – {high})"


def format_proportion(found: Proportion) -> str:
    """Format as `80% (49–94), 8 of 10`, or as a dash."""
    interval = found.interval
    if interval is None:
        return "–"
    return f"{interval.mean:.0%} ({100 * interval.low:.0f}–{100 * interval.high:.0f}), {found.hits} of {found.of}"


def report_page(summary: LabelSummary) -> str:
    """Render the page."""
    filters: dict[str, Callable[..., str]] = {"percent": "{:.0%}".format, "share": format_proportion}
    filters |= {"number": format_number, "interval": format_interval}
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


def _histogram(seconds: Sequence[float]) -> dict[str, int]:
    edges = [0, *SECONDS_EDGES]
    bars = [*(f"{low}–{high}" for low, high in pairwise(edges)), f"{edges[-1]}+"]
    return dict(zip(bars, np.histogram(seconds, [*edges, math.inf])[0].tolist(), strict=True))
