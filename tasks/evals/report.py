"""Report of the evaluation as one self-contained HTML file, and the same as JSON."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tasks.core.paths import Artifacts
from tasks.core.rows import read_table
from tasks.evals import plots
from tasks.evals.compare import HackingFinding, ScoredResponse, Table, examples_to_dict, select_examples, win_rates_of
from tasks.evals.report_columns import WIN_RATE_COLUMNS, cells, columns_of, format_signed
from tasks.evals.report_text import best_policy, display_name, join_and, load_template, summarise_table, turning_point
from tasks.models.loading import is_disabled
from tasks.rl.hacking import DETECTORS

if TYPE_CHECKING:
    from tasks.config.evaluation import EvaluateParams
    from tasks.config.reward import RewardParams

__all__ = ["ReportData", "UpstreamResults", "collect_sources", "render_report", "report_to_dict"]

Rows = Sequence[Mapping[str, str]]

FIGURES = {
    "win_rates": (
        "Win rates",
        "How often each judge prefers the policy's response to SFT's for the same prompt (ties count half). "
        "The bar is the 95% interval: where it crosses the dotted line at 50%, the difference could be chance.",
    ),
    "reward_against_kl": (
        "Reward against distance from SFT",
        "How much each judge's score gained over SFT, against how far the policy moved (√KL, after Gao et al. 2022, "
        "arXiv 2210.10760). Where the hollow proxy is far above the filled judges, the policy earned reward that its "
        "answers do not deserve. Bars: 95% interval.",
    ),
    "lengths": (
        "Length of responses",
        "How many responses have how many words; the dotted line is the mean. A policy that only learned to write "
        "longer or shorter shows here.",
    ),
    "accuracy_by_margin": (
        "Reward model: accuracy by margin",
        "Of two held-out sentences, how often the reward model prefers the one that people rated higher, by how far "
        "the ratings lie apart; n is the number of pairs, bars are 95% intervals. Beside it how often a single person "
        "agrees with the others: nobody can expect much more.",
    ),
    "calibration": (
        "Reward model: calibration",
        "When the model says that it is 80% sure, is it right 80% of the time? On the dotted line it is; below it, it "
        "is too sure of itself. Larger points: more held-out cases. Bars: 95% intervals.",
    ),
}
"""Figure → title and note."""

CURVES = {
    "reward": (
        "Reward during training", "mean reward per update",
        "What PPO and GRPO maximise, before the KL penalty. It should rise; that alone does not mean better answers.",
    ),
    "kl": (
        "Distance from SFT during training", "KL to SFT, nats per response",
        "How far the policy moved from SFT: the average log-ratio of the two models' probabilities of a whole "
        "response. It rises as the policy learns; a sudden jump is a warning.",
    ),
    "kl_coef": (
        "Weight of the KL penalty", "KL coefficient β",
        "How strongly moving away from SFT is punished. An adaptive controller changes it.",
    ),
    "entropy": (
        "Entropy during training", "entropy, nats per token",
        "How undecided the policy is at each token. A fall to near 0 means that it always writes the same.",
    ),
    "length": (
        "Response length during training", "tokens per response",
        "A steady drift means that the policy is paid for length.",
    ),
}  # fmt: skip
"""Column of history.csv → title, axis and note; columns `reward/<component>` are drawn too."""

EXAMPLE_KINDS = {
    "gains": ("Largest gains", "The gold judge puts them above SFT's response by the most, in its own points."),
    "losses": ("Largest losses", "The gold judge puts them below SFT's response by the most, in its own points."),
    "disagreements": (
        "Largest disagreements between proxy and gold",
        "The proxy is far more pleased with them than the gold judge: gain over SFT by the proxy less gain by the gold "
        "judge, each in standard deviations of the scores of SFT's responses. Here reward hacking would show first.",
    ),
}
"""Kind of example → title and note, see `tasks.evals.compare.select_examples`."""

SIDE_BY_SIDE = 3
"""Number of prompts shown open; the others are folded."""


@dataclass(frozen=True)
class UpstreamResults:
    """Results of earlier stages.

    Attributes:
        points: rows of the over-optimisation curve; none where that stage is off.
        fits: method → judge → its fit, see `tasks.evals.overoptimisation`.
        benchmarks: policy → task → metric → [value, standard error or None]; none where stage lm_eval is off.
        accuracy, calibration: rows of the reward model's accuracy_by_margin.csv and calibration.csv.
        challenge: judge → category → accuracy on pairs made by rule, with its interval; see `tasks.evals.challenge`.
        sources: see `collect_sources`.
        has_gold_judge: whether the gold judge is a model of people's ratings; else it is whether the answer is right.
    """

    points: Rows
    fits: Mapping[str, Any]
    benchmarks: Mapping[str, Any]
    accuracy: Rows
    calibration: Rows
    challenge: Mapping[str, Mapping[str, Mapping[str, str]]]
    has_gold_judge: bool
    sources: Sequence[Mapping[str, str]]

    @classmethod
    def read(cls, artifacts: Artifacts) -> Self:
        """Read the results from the folders of the stages."""
        return cls(
            points=read_table(artifacts.overoptimisation / "points.csv"),
            fits=_read_json(artifacts.overoptimisation / "fits.json"),
            benchmarks=_read_json(artifacts.lm_eval / "results.json"),
            accuracy=read_table(artifacts.reward_model / "accuracy_by_margin.csv"),
            calibration=read_table(artifacts.reward_model / "calibration.csv"),
            challenge=_read_challenge({"Reward model": artifacts.reward_model, "Gold judge": artifacts.gold_judge}),
            has_gold_judge=not is_disabled(artifacts.gold_judge),
            sources=collect_sources(artifacts.base_model, artifacts.collect),
        )


@dataclass(frozen=True)
class ReportData:
    """Data of the report.

    Attributes:
        controls: rows of the controls, see `tasks.evals.compare.CONTROLS`.
        records: the first draw of each policy for each prompt.
        histories: policy → rows of its history.csv; a policy without curves is left out.
        reward: the proxy reward that training maximised.
        provenance: (what, value) pairs that identify this evaluation.
    """

    table: Table
    controls: Table
    records: Sequence[ScoredResponse]
    findings: Mapping[str, Sequence[HackingFinding]]
    histories: Mapping[str, Rows]
    upstream: UpstreamResults
    params: EvaluateParams
    reward: RewardParams
    provenance: Sequence[tuple[str, str]]

    @property
    def flagged(self) -> list[str]:
        """Policies with signs of reward hacking."""
        return [policy for policy, own in self.findings.items() if own]


def render_report(data: ReportData) -> str:
    """Render the page as HTML; equal data gives equal bytes."""
    table, upstream, rule = data.table, data.upstream, data.params.gold_rule
    columns = columns_of(table, has_gold_judge=upstream.has_gold_judge, has_gold_rule=rule is not None)
    filters: dict[str, Callable[..., str]] = {
        "escape_control_chars": escape_control_chars, "format_signed": format_signed, "name": display_name,
    }  # fmt: skip
    first_row = next(iter(table.values()))
    return load_template("report.html.j2", filters, autoescape=True).render(
        summary=summarise_table(table, data.flagged), turning=turning_point(upstream.fits, upstream.points),
        hacking_summary=_hacking_summary(data.findings), upstream=upstream,
        findings=[(policy, finding) for policy, own in data.findings.items() for finding in own],
        columns=columns, cells=cells(table, columns), control_cells=cells(data.controls, columns),
        win_rate_columns=list(WIN_RATE_COLUMNS), win_rate_cells=cells({**table, **data.controls}, WIN_RATE_COLUMNS),
        best_of_n=data.params.best_of_n, draws=(data.params.samples_per_prompt, data.params.reference_samples),
        count=int(first_row["n"]), is_multi_turn="success" in first_row, judges=win_rates_of(table),
        reward=data.reward, gold_rule=rule and rule.function,
        result_figures=_result_figures(data), curve_figures=_curve_figures(upstream),
        training_figures=_training_figures(data.histories), reward_model_figures=_reward_model_figures(upstream),
        examples=_example_sections(data), samples=_side_by_side(data), side_by_side=SIDE_BY_SIDE,
        provenance=data.provenance,
    )  # fmt: skip


def report_to_dict(data: ReportData) -> dict[str, Any]:
    """Content of the page as JSON types."""
    return {
        "summary": asdict(summarise_table(data.table, data.flagged)),
        "turning_point": turning_point(data.upstream.fits, data.upstream.points),
        "findings": {policy: [asdict(finding) for finding in own] for policy, own in data.findings.items()},
        "policies": data.table,
        "controls": data.controls,
        "fits": data.upstream.fits,
        "examples": {policy: examples_to_dict(own) for policy, own in select_examples(data.records).items()},
        "sources": data.upstream.sources,
        "provenance": dict(data.provenance),
    }


def collect_sources(base_model: Path, collect: Path) -> list[dict[str, str]]:
    """Collect the base model, then the data sources by name; the arguments are the folders of those stages.

    Keys: `name`, `source`; `licence`, "" if it was not recorded; `size`, parameters or rows, with the unit; `digest`,
    the first 16 characters of a hash of this version, "" if there is none.
    """
    card = _read_json(base_model / "card.json")
    digests = (card[key] for key in ("sha256", "sha256_of_weights", "commit") if key in card)
    model = _source("Base model", card, f"{card['parameters']:,} parameters", next(digests, ""))
    cards = [_read_json(path) for path in sorted((collect / "cards").glob("*.json"))]
    return [model] + [
        _source(f"Data: {card['name']}", card, f"{card['rows']:,} rows", card["sha256_of_rows"]) for card in cards
    ]


def _source(name: str, card: Mapping[str, Any], size: str, digest: str) -> dict[str, str]:
    licence = "" if card["licence"] == "unknown" else str(card["licence"])
    return {"name": name, "source": card["source"], "licence": licence, "size": size, "digest": digest[:16]}


def _read_challenge(folders: Mapping[str, Path]) -> dict[str, dict[str, dict[str, str]]]:
    """Judge → category → row of its challenge.csv, without judges that have no pairs."""
    tables = {judge: read_table(folder / "challenge.csv") for judge, folder in folders.items()}
    return {judge: {row["category"]: row for row in rows} for judge, rows in tables.items() if rows}


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def escape_control_chars(text: str) -> str:
    """Replace control characters, which HTML forbids or hides, by U+FFFD."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text)


def _hacking_summary(findings: Mapping[str, Sequence[HackingFinding]]) -> str:
    """Sentence that names the detectors that fired."""
    parts = [
        f"{display_name(policy)}: {join_and(list(dict.fromkeys(finding.detector for finding in own)))}"
        for policy, own in findings.items()
        if own
    ]
    if not parts:
        return f"None of {len(DETECTORS) + 1} detectors of reward hacking fired, neither in training nor at evaluation."
    return f"Signs of reward hacking: {'; '.join(parts)}."


def _figure(svg: str, title: str, note: str) -> dict[str, str]:
    return {"svg": svg, "title": title, "note": note}


def _result_figures(data: ReportData) -> list[dict[str, str]]:
    svgs = {"win_rates": plots.win_rates(data.table)} if len(data.table) > 1 else {}
    svgs["reward_against_kl"] = plots.reward_against_kl(data.table)
    svgs["lengths"] = plots.lengths(plots.length_counts(data.records))
    return [_figure(svg, *FIGURES[name]) for name, svg in svgs.items()]


def _curve_figures(upstream: UpstreamResults) -> list[dict[str, str]]:
    notes = {"best_of_n": "Each point is the best of 2, 4, 8, … of SFT's responses, as the proxy chooses."}
    default_note = "Each point is the policy at a moment of its training."
    svgs = plots.overoptimisation(upstream.points, upstream.fits) if upstream.points else {}
    return [
        _figure(svg, f"Over-optimisation: {display_name(method)}", notes.get(method, default_note))
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
        part = column.partition("/")[2]
        note = "One part of the reward by itself, before its weight."
        title, axis, note = CURVES.get(column, (f"Reward component: {part}", f"mean of {part}", note))
        figures.append(_figure(plots.curves(column.replace("/", "-"), series, y_label=axis), title, note))
    return figures


def _curve_points(rows: Rows, column: str) -> list[tuple[float, float]]:
    """(step, value) wherever the row has both."""
    return [(float(row["step"]), float(row[column])) for row in rows if row.get("step") and row.get(column)]


def _reward_model_figures(upstream: UpstreamResults) -> list[dict[str, str]]:
    svgs = {}
    if any(row["accuracy"] for row in upstream.accuracy):  # empty if no pair has a margin
        svgs["accuracy_by_margin"] = plots.accuracy_by_margin(upstream.accuracy)
    if upstream.calibration:
        svgs["calibration"] = plots.calibration(upstream.calibration)
    return [_figure(svg, *FIGURES[name]) for name, svg in svgs.items()]


def _side_by_side(data: ReportData) -> list[dict[str, Any]]:
    """First prompts in the random order of the evaluation, so they are not hand-picked."""
    answers: dict[str, list[ScoredResponse]] = {}
    for record in data.records:
        answers.setdefault(record.prompt_id, []).append(record)
    shown = list(answers.values())[: data.params.report_samples]
    return [{"prompt": group[0].prompt, "answers": group} for group in shown]


def _example_sections(data: ReportData) -> list[dict[str, Any]]:
    """Example sections per policy; open for the best policy and for those with findings."""
    shown = {best_policy(data.table), *data.flagged}
    sections = []
    for policy, own in select_examples(data.records).items():
        kinds = [{"kind": kind, "title": t, "note": n, "examples": own[kind]} for kind, (t, n) in EXAMPLE_KINDS.items()]
        sections.append({"policy": policy, "shown": policy in shown, "kinds": kinds})
    return sections
