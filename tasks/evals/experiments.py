"""Comparison of pipeline variants: a table, and a plot of reward against KL."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tasks.core.errors import RLHFError, TrainingError
from tasks.core.rows import write_json, write_table
from tasks.evals.compare import DIGITS, REFERENCE, Table, judges_of
from tasks.evals.statistics import t_interval

__all__ = [
    "METRICS",
    "VARIANT_COLUMNS",
    "SeedResult",
    "SeedSummary",
    "collapse_reason",
    "flat_metrics",
    "load_seed_result",
    "plot_comparison",
    "plot_seeds",
    "summarise_seeds",
    "write_comparison",
    "write_summary",
]

VARIANT_COLUMNS = ("win_rate", "win_rate_low", "win_rate_high", "reward_gold", "reward_proxy", "kl", "length")
"""Columns of the table."""


def write_comparison(folder: Path, variants: Mapping[str, Table]) -> None:
    """Write variants.json (variant → policy → numbers), variants.csv (a row per variant and policy) and the plot."""
    write_json(folder / "variants.json", dict(variants))
    write_table(folder / "variants.csv", [
        {"variant": variant, "policy": policy} | {key: row[key] for key in VARIANT_COLUMNS if key in row}
        for variant, table in variants.items() for policy, row in table.items() if policy != REFERENCE
    ])  # fmt: skip
    plot_comparison(folder / "reward_against_kl.svg", variants)


def plot_comparison(path: Path, variants: Mapping[str, Table]) -> None:
    """Plot gain over SFT against √KL: a panel per judge, a colour per variant, a marker per policy.

    As Gao et al. 2022 (arXiv 2210.10760, section 3) plot it: where the proxy still gains and gold no longer does, the
    policy exploits the proxy.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    judges = [judge for judge in ("proxy", "gold") if judge in judges_of(next(iter(variants.values())))]
    policies = sorted({policy for table in variants.values() for policy in table if policy != REFERENCE})
    markers = dict(zip(policies, "osD^v*", strict=False))
    figure = Figure(figsize=(5.2 * len(judges), 4), layout="constrained")
    panels = figure.subplots(1, len(judges), sharex=True, sharey=True, squeeze=False)[0]
    for axes, judge in zip(panels, judges, strict=True):
        for colour, table in enumerate(variants.values()):
            for policy in policies:
                if row := table.get(policy):
                    axes.errorbar(
                        max(row["kl"], 0.0) ** 0.5, row[f"gain_{judge}"], yerr=1.96 * row[f"gain_{judge}_stderr"],
                        marker=markers[policy], color=f"C{colour}", capsize=2, linestyle="none",
                    )  # fmt: skip
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set(title=f"by {judge}", xlabel="√KL to SFT, √nats")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("gain over SFT, standard deviations")
    keys = [Line2D([], [], color=f"C{colour}", label=name) for colour, name in enumerate(variants)]
    keys += [
        Line2D([], [], color="grey", marker=markers[policy], linestyle="none", label=policy) for policy in policies
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "variants"}):
        figure.savefig(path, metadata={"Date": None})


METRICS = {
    "win_rate": "win rate against SFT",
    "gain_gold": "gold gain, standard deviations",
    "gain_proxy": "proxy gain, standard deviations",
    "kl": "KL to SFT, nats",
}
"""Metrics averaged over seeds, with their titles."""

SEED_COLUMNS = (
    "win_rate", "win_rate_low", "win_rate_high", "gain_gold", "gain_gold_stderr", "gain_proxy", "gain_proxy_stderr",
    "kl", "kl_stderr", "reward_gold", "reward_proxy", "length", "repetition", "truncated_share",
)  # fmt: skip
"""Columns of one seed."""

STEP, WIDTH = 0.05, 0.5
"""Distance of the dots of two seeds, and its maximum over all seeds; policies have distance 1."""


@dataclass(frozen=True)
class SeedResult:
    """Result of one seed.

    Attributes:
        table: its evaluation.
        degenerate_count: policy → count of degenerate responses of its last update, see
            `tasks.rl.hacking.degeneration`; 0 for DPO, which writes none while it trains.
        detectors: policy → the detectors of reward hacking that fired.
    """

    table: Table
    degenerate_count: Mapping[str, float]
    detectors: Mapping[str, Sequence[str]]


Results = Mapping[int, SeedResult | RLHFError]
"""Seed → its result, or the error that ended it."""


@dataclass(frozen=True)
class SeedSummary:
    """Summary of a metric over seeds; `low` and `high` are the 95 % interval of the mean, None for one seed."""

    seeds: int
    mean: float
    low: float | None
    high: float | None
    min: float
    max: float


def load_seed_result(artifacts: Path) -> SeedResult:
    """Load the results that the stages wrote under one seed."""
    table: Table = _read_json(artifacts / "evaluate" / "policies.json")
    last = {policy: _read_json(artifacts / policy / "metrics.json") for policy in table if policy != REFERENCE}
    findings = _read_json(artifacts / "evaluate" / "findings.json")
    return SeedResult(
        table,
        {policy: float(row.get("degenerate_count", 0.0)) for policy, row in last.items()},
        {policy: list(dict.fromkeys(finding["detector"] for finding in own)) for policy, own in findings.items()},
    )


def collapse_reason(row: Mapping[str, float], degenerate_count: float) -> str | None:
    """Reason why a policy collapsed, or None: it is clearly worse than SFT, or its last responses are degenerate.

    Args:
        row: of the policy in the evaluation.
        degenerate_count: see `SeedResult`.
    """
    reasons = []
    if row["win_rate_high"] < 0.5:
        interval = f"{row['win_rate_low']:.0%}–{row['win_rate_high']:.0%}"
        reasons.append(f"its win rate's whole interval, {interval}, lies below one half")
    if degenerate_count > 0:
        reasons.append("its last responses are all empty, all the same, or all without an end")
    return "; ".join(reasons) or None


def summarise_seeds(results: Results) -> dict[str, Any]:
    """Summarise all seeds as JSON types.

    `policies` gives each policy a `summary`, figure → `SeedSummary`, and its `seeds`, seed → figures with `detectors`,
    those that fired, and `collapsed`, the reason or null; `collapsed` and `failed` hold a sentence for each.

    Means are over every evaluated seed, collapsed ones included: leaving those out would
    select seeds by their result. A training that failed with a TrainingError counts as collapsed, too.
    """
    trained = {seed: result for seed, result in results.items() if isinstance(result, SeedResult)}
    policies = dict.fromkeys(policy for result in trained.values() for policy in result.table if policy != REFERENCE)
    rows = {policy: {seed: _seed_row(result, policy) for seed, result in trained.items()} for policy in policies}
    errors = {seed: result for seed, result in results.items() if isinstance(result, RLHFError)}
    diverged = [seed for seed, error in errors.items() if isinstance(error, TrainingError)]
    return {
        "seeds": list(results),
        "policies": {
            policy: {"summary": _summarise_metrics(list(own.values())), "seeds": {str(seed): row for seed, row in
            own.items()}} for policy, own in rows.items()
        },
        "collapsed": [
            *(f"{policy}, seed {seed}: {row['collapsed']}" for policy, own in rows.items()
              for seed, row in own.items() if row["collapsed"]),
            *(f"seed {seed}: its training failed" for seed in diverged),
        ],
        "failed": [f"seed {seed}: {error}" for seed, error in errors.items()],
    }  # fmt: skip


def flat_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """Flatten the summary into metrics `seeds.<policy>.<metric>_<statistic>`."""
    return {
        f"seeds.{policy}.{figure}_{what}": value
        for policy, own in summary["policies"].items()
        for figure, values in own["summary"].items()
        for what, value in values.items()
        if value is not None
    }


def write_summary(folder: Path, results: Results) -> None:
    """Write seeds.json (see `summarise_seeds`), seeds.csv (a row per policy and seed) and seeds.svg."""
    summary = summarise_seeds(results)
    write_json(folder / "seeds.json", summary)
    write_table(folder / "seeds.csv", [
        {"policy": policy, "seed": seed} | row
        for policy, own in summary["policies"].items() for seed, row in own["seeds"].items()
    ], columns=("policy", "seed", *SEED_COLUMNS, "detectors", "collapsed"))  # fmt: skip
    plot_seeds(folder / "seeds.svg", summary)


def plot_seeds(path: Path, summary: Mapping[str, Any]) -> None:
    """Plot a panel per metric: a dot per seed, a cross if it collapsed, and the mean with its interval."""
    import matplotlib
    from matplotlib.figure import Figure

    policies = summary["policies"]
    metrics = [name for name in METRICS if any(name in own["summary"] for own in policies.values())]
    figure = Figure(figsize=(3.4 * max(len(metrics), 1), 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, max(len(metrics), 1), squeeze=False)[0], metrics, strict=False):
        for place, own in enumerate(policies.values()):
            _plot_policy(axes, place, name, own)
        axes.set(title=METRICS[name], xticks=range(len(policies)), xlim=(-0.5, len(policies) - 0.5))
        axes.set_xticklabels(policies)
        axes.axhline(0.5 if name == "win_rate" else 0.0, color="grey", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "seeds"}):
        figure.savefig(path, metadata={"Date": None})


def _plot_policy(axes: Any, place: int, name: str, own: Mapping[str, Any]) -> None:
    summary, count = own["summary"][name], len(own["seeds"])
    for number, (seed, row) in enumerate(own["seeds"].items()):
        x = place + min(STEP, WIDTH / count) * (number - (count - 1) / 2)
        axes.plot(x, row[name], marker="x" if row["collapsed"] else "o", color=f"C{place}", alpha=0.7)
        if row["collapsed"]:
            axes.annotate(f" seed {seed}", (x, row[name]), fontsize="x-small")
    ends = (
        [[summary["mean"] - summary["low"]], [summary["high"] - summary["mean"]]]
        if summary["low"] is not None
        else None
    )
    axes.errorbar(place + 0.35, summary["mean"], yerr=ends, marker="D", color="black", capsize=3)


def _seed_row(result: SeedResult, policy: str) -> dict[str, Any]:
    row = result.table[policy]
    values: dict[str, Any] = {key: row[key] for key in SEED_COLUMNS if key in row}
    fired = " ".join(result.detectors[policy])
    return values | {"detectors": fired, "collapsed": collapse_reason(row, result.degenerate_count[policy])}


def _summarise_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: asdict(_summarise_values([row[name] for row in rows])) for name in METRICS if name in rows[0]}


def _summarise_values(values: Sequence[float]) -> SeedSummary:
    interval = t_interval(values) if len(values) > 1 else None
    return SeedSummary(
        seeds=len(values),
        mean=round(sum(values) / len(values), DIGITS),
        low=round(interval.low, DIGITS) if interval else None,
        high=round(interval.high, DIGITS) if interval else None,
        min=min(values),
        max=max(values),
    )


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
