"""Report of the evaluation as one self-contained HTML file, and the same as JSON."""

from __future__ import annotations

import csv
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from tasks.core.text_stats import word_count
from tasks.evals import hacking_report, plots
from tasks.evals.compare import DIGITS, REFERENCE, WIN_RATE_KEYS, ScoredResponse, Table, score_std, win_rates_of
from tasks.evals.hacking_report import HackingFinding
from tasks.evals.report_text import (
    DISPLAY_NAMES,
    best_policy,
    cells,
    columns_of,
    format_signed,
    join_and,
    summarise_table,
    turning_point,
)
from tasks.evals.statistics import TIE_TOLERANCE
from tasks.rl.hacking import DETECTORS

__all__ = [
    "EXAMPLES_PER_KIND",
    "Example",
    "Examples",
    "ReportData",
    "SourceInfo",
    "collect_sources",
    "examples_to_dict",
    "length_counts",
    "load_template",
    "read_table",
    "render_report",
    "report_to_dict",
    "select_examples",
]


def load_template(
    name: str, filters: Mapping[str, Callable[..., str]], *, autoescape: bool, folder: Path = Path(__file__).parent
) -> Template:
    """Load a template by its file name.

    Args:
        autoescape: escape inserted text, for HTML.
        folder: folder of the template, by default that of this file.
    """
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    return environment.get_template(name)


def length_counts(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Count responses per length, from the shortest to the longest, zeros included."""
    if not lengths:
        return []
    counts = Counter(lengths)
    return [(length, counts[length]) for length in range(min(lengths), max(lengths) + 1)]


EXAMPLES_PER_KIND = 3
"""Number of examples per kind and policy; a reader still reads nine pairs of responses."""


@dataclass(frozen=True)
class Example:
    """Responses of a policy and the reference to one prompt; `score_difference` is what they are ranked by."""

    score_difference: float
    reference: ScoredResponse
    own: ScoredResponse


@dataclass(frozen=True)
class Examples:
    """Examples of one policy, largest difference first; a list is shorter if fewer responses qualify.

    Attributes:
        gains: above the reference by the gold judge, in its own points.
        losses: below it; `score_difference` is negative.
        disagreements: gain by the proxy less gain by the gold judge, each in standard deviations of the reference's
            scores: the proxy scores them high and the gold judge low, so they are candidates for reward hacking.
    """

    gains: tuple[Example, ...]
    losses: tuple[Example, ...]
    disagreements: tuple[Example, ...]


def select_examples(records: Sequence[ScoredResponse], count: int = EXAMPLES_PER_KIND) -> dict[str, Examples]:
    """Select the examples of each policy except the reference; ties are ordered by prompt id."""
    groups: dict[str, list[ScoredResponse]] = {}
    for record in records:
        groups.setdefault(record.policy, []).append(record)
    reference = {record.prompt_id: record for record in groups.pop(REFERENCE)}
    gold, proxy = (_standardised_gain(judge, list(reference.values())) for judge in ("gold", "proxy"))

    def gold_difference(own: ScoredResponse, other: ScoredResponse) -> float:
        return own.gold - other.gold

    def disagreement(own: ScoredResponse, other: ScoredResponse) -> float:
        return proxy(own, other) - gold(own, other)

    return {
        policy: Examples(
            gains=_top_examples(group, reference, gold_difference, count, sign=1),
            losses=_top_examples(group, reference, gold_difference, count, sign=-1),
            disagreements=_top_examples(group, reference, disagreement, count, sign=1),
        )
        for policy, group in groups.items()
    }


def examples_to_dict(examples: Examples) -> dict[str, list[dict[str, Any]]]:
    """Convert to JSON types."""
    return {kind: [_example_to_dict(example) for example in group] for kind, group in vars(examples).items()}


def _standardised_gain(
    judge: str, reference: Sequence[ScoredResponse]
) -> Callable[[ScoredResponse, ScoredResponse], float]:
    """Gain by the judge in standard deviations of the reference's scores."""
    deviation = score_std([record.score(judge) or 0.0 for record in reference])
    return lambda own, other: ((own.score(judge) or 0.0) - (other.score(judge) or 0.0)) / deviation


def _top_examples(
    group: Sequence[ScoredResponse],
    reference: dict[str, ScoredResponse],
    value: Callable[[ScoredResponse, ScoredResponse], float],
    count: int,
    *,
    sign: int,
) -> tuple[Example, ...]:
    pairs = [(own, reference[own.prompt_id]) for own in group]
    examples = [Example(value(own, other), other, own) for own, other in pairs]
    kept = [example for example in examples if sign * example.score_difference > TIE_TOLERANCE]
    return tuple(sorted(kept, key=lambda example: (-sign * example.score_difference, example.own.prompt_id))[:count])


def _example_to_dict(example: Example) -> dict[str, Any]:
    sides = {record.policy: _response_to_dict(record) for record in (example.reference, example.own)}
    return {
        "prompt_id": example.own.prompt_id,
        "prompt": example.own.prompt,
        "score_difference": round(example.score_difference, DIGITS),
    } | sides


def _response_to_dict(record: ScoredResponse) -> dict[str, Any]:
    scores = {judge: score for judge in WIN_RATE_KEYS if (score := record.score(judge)) is not None}
    return {"response": record.display_text, "ended": record.ended, "kl": record.kl} | scores


@dataclass(frozen=True)
class SourceInfo:
    """Base model or data source.

    Attributes:
        licence: "" if it was not recorded.
        size: number of parameters or rows, with the unit.
        digest: first 16 characters of a hash that identifies this version; "" if there is none.
    """

    name: str
    source: str
    licence: str
    size: str
    digest: str


def collect_sources(base_model: Path, collect: Path) -> list[SourceInfo]:
    """Collect the base model, then the data sources by name; the arguments are the folders of those stages."""
    card = _read_card(base_model / "card.json")
    sources = [_read_card(path) for path in sorted((collect / "cards").glob("*.json"))]
    return [_model_source(card), *[_data_source(card) for card in sources]]


def _model_source(card: Mapping[str, Any]) -> SourceInfo:
    digests = (card[key] for key in ("sha256", "sha256_of_weights", "commit") if key in card)
    size = f"{card['parameters']:,} parameters"
    return SourceInfo("Base model", card["source"], _licence(card), size, next(digests, "")[:16])


def _data_source(card: Mapping[str, Any]) -> SourceInfo:
    size = f"{card['rows']:,} rows"
    return SourceInfo(f"Data: {card['name']}", card["source"], _licence(card), size, card["sha256_of_rows"][:16])


def _licence(card: Mapping[str, Any]) -> str:
    licence = str(card["licence"])
    return "" if licence == "unknown" else licence


def _read_card(path: Path) -> dict[str, Any]:
    card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return card


CURVES = {
    "reward": ("Reward during training", "mean reward per update"),
    "kl": ("Distance from SFT during training", "KL to SFT, nats per response"),
    "kl_coef": ("Weight of the KL penalty", "KL coefficient β"),
    "entropy": ("Entropy during training", "entropy, nats per token"),
    "length": ("Response length during training", "tokens per response"),
}
"""Column of history.csv → title and axis; columns `reward/<component>` are drawn too."""

CURVE_NOTES = {
    "reward": "What PPO and GRPO maximise, before the KL penalty. It should rise; that alone does not mean better "
    "answers.",
    "kl": "How far the policy moved from SFT: the average log-ratio of the two models' probabilities of a whole "
    "response (for GRPO another estimate of the same quantity, k3). It rises as the policy learns; a sudden jump is a "
    "warning.",
    "kl_coef": "How strongly moving away from SFT is punished. An adaptive controller changes it.",
    "entropy": "How undecided the policy is at each token. A fall to near 0 means that it always writes the same.",
    "length": "A steady drift means that the policy is paid for length.",
}

EXAMPLE_KINDS = {
    "gains": ("Largest gains", "The gold judge puts them above SFT's response by the most, in its own points."),
    "losses": ("Largest losses", "The gold judge puts them below SFT's response by the most, in its own points."),
    "disagreements": (
        "Largest disagreements between proxy and gold",
        "The proxy is far more pleased with them than the gold judge: gain over SFT by the proxy less gain by the gold "
        "judge, each in standard deviations of the scores of SFT's responses. Here reward hacking would show first.",
    ),
}
"""Field of `examples.Examples` → title and note."""

SIDE_BY_SIDE = 3
"""Number of prompts shown open; the others are folded."""

Rows = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class ReportData:
    """Data of the report.

    Attributes:
        records: every judged response.
        findings: policy → signs of reward hacking.
        histories: policy → rows of its history.csv; a policy without curves is left out.
        points: rows of the over-optimisation curve; none where that stage is off.
        fits: method → judge → its fit, see `tasks.evals.overoptimisation`.
        benchmarks: policy → task → metric → [value, standard error or None]; none where stage lm_eval is off.
        accuracy: rows of the reward model's accuracy_by_margin.csv.
        calibration: rows of the reward model's calibration.csv.
        samples: how many prompts to show side by side.
        weights: the proxy reward's components and their weights.
        has_gold_judge: whether the gold judge is a model of people's ratings; else it is whether the answer is right.
        sources: the base model and the data.
        provenance: (what, value) pairs that identify this evaluation.
        composition: how the components are combined into one reward.
        gold_rule: rule that takes the place of the gold judge, if any.
    """

    table: Table
    records: Sequence[ScoredResponse]
    findings: Mapping[str, Sequence[HackingFinding]]
    histories: Mapping[str, Rows]
    points: Rows
    fits: Mapping[str, Any]
    benchmarks: Mapping[str, Any]
    accuracy: Rows
    calibration: Rows
    samples: int
    weights: Mapping[str, float]
    has_gold_judge: bool
    sources: Sequence[SourceInfo]
    provenance: Sequence[tuple[str, str]]
    composition: str = "sum"
    gold_rule: str | None = None


def render_report(data: ReportData) -> str:
    """Render the page as HTML; equal data gives equal bytes."""
    table = data.table
    columns = columns_of(table, has_gold_judge=data.has_gold_judge, has_gold_rule=data.gold_rule is not None)
    return load_template(
        "report.html.j2",
        {"escape_control_chars": escape_control_chars, "format_signed": format_signed},
        autoescape=True,
    ).render(
        summary=summarise_table(table, _flagged_policies(data)),
        turning=turning_point(data.fits, data.points),
        hacking_summary=_hacking_summary(data.findings),
        findings=[(policy, finding) for policy, own in data.findings.items() for finding in own],
        fits=data.fits,
        benchmarks=data.benchmarks,
        names=DISPLAY_NAMES,
        columns=columns,
        cells=cells(table, columns),
        count=int(next(iter(table.values()))["n"]),
        weights=data.weights,
        composition=data.composition,
        has_gold_judge=data.has_gold_judge,
        gold_rule=data.gold_rule,
        is_multi_turn="success" in next(iter(table.values())),
        judges=win_rates_of(table),
        result_figures=_result_figures(data),
        curve_figures=_curve_figures(data),
        training_figures=_training_figures(data.histories),
        reward_model_figures=_reward_model_figures(data),
        examples=_example_sections(data),
        samples=_side_by_side_rows(data.records, data.samples),
        side_by_side=SIDE_BY_SIDE,
        sources=data.sources,
        provenance=data.provenance,
    )


def report_to_dict(data: ReportData) -> dict[str, Any]:
    """Content of the page as JSON types."""
    return {
        "summary": asdict(summarise_table(data.table, _flagged_policies(data))),
        "turning_point": turning_point(data.fits, data.points),
        "findings": hacking_report.findings_to_dict(data.findings),
        "policies": data.table,
        "fits": data.fits,
        "examples": {policy: examples_to_dict(own) for policy, own in select_examples(data.records).items()},
        "sources": [asdict(ingredient) for ingredient in data.sources],
        "provenance": dict(data.provenance),
    }


def read_table(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file; empty if it does not exist, and the report then omits the figure."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def escape_control_chars(text: str) -> str:
    """Replace control characters, which HTML forbids or hides, by U+FFFD."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text)


def _flagged_policies(data: ReportData) -> list[str]:
    return [policy for policy, own in data.findings.items() if own]


def _hacking_summary(by_policy: Mapping[str, Sequence[HackingFinding]]) -> str:
    """Sentence that names the detectors that fired."""
    fired = {
        policy: list(dict.fromkeys(finding.detector for finding in own)) for policy, own in by_policy.items() if own
    }
    if not fired:
        return f"None of {len(DETECTORS) + 1} detectors of reward hacking fired, neither in training nor at evaluation."
    parts = [f"{DISPLAY_NAMES[policy]}: {join_and(own)}" for policy, own in fired.items()]
    parts = [f"{DISPLAY_NAMES[policy]}: {join_and(own)}" for policy, own in fired.items()]
    return f"Signs of reward hacking: {'; '.join(parts)}."


def _figure_block(svg: str, title: str, note: str) -> dict[str, str]:
    return {"svg": svg, "title": title, "note": note}


def _result_figures(data: ReportData) -> list[dict[str, str]]:
    counts = {
        policy: length_counts([word_count(record.response) for record in data.records if record.policy == policy])
        for policy in data.table
    }
    figures = []
    if len(data.table) > 1:
        figures.append(
            _figure_block(
                plots.win_rates(data.table),
                "Win rates",
                "How often each judge prefers the policy's response to SFT's for the same prompt (ties count half). "
                "The bar is the 95% interval: where it crosses the dotted line at 50%, the difference could be chance.",
            )
        )
    return [
        *figures,
        _figure_block(
            plots.reward_against_kl(data.table),
            "Reward against distance from SFT",
            "How much each judge's score gained over SFT, against how far the policy moved (√KL, after Gao et al. "
            "2022, arXiv 2210.10760). Where the hollow proxy is far above the filled judges, the policy earned reward "
            "that its answers do not deserve. Bars: 95% interval.",
        ),
        _figure_block(
            plots.lengths(counts),
            "Length of responses",
            "How many responses have how many words; the dotted line is the mean. A policy that only learned to write "
            "longer or shorter shows here.",
        ),
    ]


def _curve_figures(data: ReportData) -> list[dict[str, str]]:
    if not data.points:
        return []
    notes = {"best_of_n": "Each point is the best of 2, 4, 8, … of SFT's responses, as the proxy chooses."}
    default_note = "Each point is the policy at a moment of its training."
    svgs = plots.overoptimisation(data.points, data.fits)
    return [
        _figure_block(svg, f"Over-optimisation: {DISPLAY_NAMES[method]}", notes.get(method, default_note))
        for method, svg in svgs.items()
    ]


def _training_figures(histories: Mapping[str, Rows]) -> list[dict[str, str]]:
    columns = list(dict.fromkeys(column for rows in histories.values() for row in rows for column in row))
    components = [column for column in columns if column.startswith("reward/")]
    selected = [column for column in ("reward", *components, *list(CURVES)[1:]) if column in columns]
    figures = []
    for column in selected:
        series = {policy: _curve_points(rows, column) for policy, rows in histories.items()}
        series = {policy: points for policy, points in series.items() if points}
        constant = column == "kl_coef" and len({value for points in series.values() for _, value in points}) == 1
        if constant or not series:
            continue
        component = column.partition("/")[2]
        title, axis = CURVES.get(column, (f"Reward component: {component}", f"mean of {component}"))
        note = CURVE_NOTES.get(column, "One part of the reward by itself, before its weight.")
        figures.append(_figure_block(plots.curves(column.replace("/", "-"), series, y_label=axis), title, note))
    return figures


def _curve_points(rows: Rows, column: str) -> list[tuple[float, float]]:
    """(step, value) wherever the row has both."""
    return [(float(row["step"]), float(row[column])) for row in rows if row.get("step") and row.get(column)]


def _reward_model_figures(data: ReportData) -> list[dict[str, str]]:
    figures = []
    if any(row["accuracy"] for row in data.accuracy):  # empty if no pair has a margin
        figures.append(
            _figure_block(
                plots.accuracy_by_margin(data.accuracy),
                "Reward model: accuracy by margin",
                "Of two held-out sentences, how often the reward model prefers the one that people rated higher, by "
                "how far the ratings lie apart; n is the number of pairs, bars are 95% intervals. Beside it how often "
                "a single person agrees with the others: nobody can expect much more.",
            )
        )
    if data.calibration:
        figures.append(
            _figure_block(
                plots.calibration(data.calibration),
                "Reward model: calibration",
                "When the model says that it is 80% sure, is it right 80% of the time? On the dotted line it is; below "
                "it, it is too sure of itself. Larger points: more held-out cases. Bars: 95% intervals.",
            )
        )
    return figures


def _side_by_side_rows(records: Sequence[ScoredResponse], count: int) -> list[dict[str, Any]]:
    """First prompts in the random order of the evaluation, so they are not hand-picked."""
    answers: dict[str, list[ScoredResponse]] = {}
    for record in records:
        answers.setdefault(record.prompt_id, []).append(record)
    return [{"prompt": group[0].prompt, "answers": group} for group in list(answers.values())[:count]]


def _example_sections(data: ReportData) -> list[dict[str, Any]]:
    """Example sections per policy; open for the best policy and for those with findings."""
    shown = {best_policy(data.table), *(policy for policy, own in data.findings.items() if own)}
    return [
        {
            "policy": policy,
            "shown": policy in shown,
            "kinds": [
                {"kind": kind, "title": title, "note": note, "examples": getattr(own, kind)}
                for kind, (title, note) in EXAMPLE_KINDS.items()
            ],
        }
        for policy, own in select_examples(data.records).items()
    ]
