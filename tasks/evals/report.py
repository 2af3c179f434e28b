"""Report of the evaluation as one self-contained HTML file, and the same as JSON."""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tasks.evals import examples, findings, plots
from tasks.evals.columns import cells, columns_of, format_signed
from tasks.evals.compare import ScoredResponse, Table, win_rates_of
from tasks.evals.findings import HackingFinding
from tasks.evals.lineage import SourceInfo
from tasks.evals.templates import load_template
from tasks.evals.text import length_counts, word_count
from tasks.evals.turning import turning_point
from tasks.evals.verdict import DISPLAY_NAMES, best_policy, summarise_table, join_and
from tasks.rl.detectors import DETECTORS

__all__ = ["ReportData", "report_to_dict", "read_table", "render_report"]

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
    return load_template("report.html.j2", {"escape_control_chars": escape_control_chars, "format_signed": format_signed}, autoescape=True).render(
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
        "findings": findings.findings_to_dict(data.findings),
        "policies": data.table,
        "fits": data.fits,
        "examples": {policy: examples.examples_to_dict(own) for policy, own in examples.select_examples(data.records).items()},
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
    fired = {policy: list(dict.fromkeys(finding.detector for finding in own)) for policy, own in by_policy.items() if own}
    if not fired:
        return f"None of {len(DETECTORS) + 1} detectors of reward hacking fired, neither in training nor at evaluation."
    return f"Signs of reward hacking: {'; '.join(f'{DISPLAY_NAMES[policy]}: {join_and(own)}' for policy, own in fired.items())}."


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
        _figure_block(svg, f"Over-optimisation: {DISPLAY_NAMES[method]}", notes.get(method, default_note)) for method, svg in svgs.items()
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
        for policy, own in examples.select_examples(data.records).items()
    ]
