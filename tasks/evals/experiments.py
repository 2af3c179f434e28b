"""Comparison of runs: variants of the pipeline side by side, and one pipeline under several seeds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import median_low
from typing import Any

from tasks.core.errors import RLHFError, TrainingError
from tasks.core.rows import flatten, write_json, write_table
from tasks.evals import seed_statistics
from tasks.evals.compare import DIGITS, REFERENCE, Table, judges_of
from tasks.evals.seed_statistics import SeedValues, bootstrap_seeds, wins_by_prompt
from tasks.evals.statistics import t_interval

__all__ = [
    "SeedResult", "collapse_reason", "flat_metrics", "load_seed_result", "make_panels", "save_figure",
    "summarise_seeds", "write_comparison", "write_summary",
]  # fmt: skip

VARIANT_COLUMNS = ("win_rate", "win_rate_low", "win_rate_high", "reward_gold", "reward_proxy", "kl", "length")
"""Columns of one variant's policy."""

SEED_COLUMNS = (
    "win_rate", "win_rate_low", "win_rate_high", "gain_gold", "gain_gold_stderr", "gain_proxy", "gain_proxy_stderr",
    "kl", "kl_stderr", "reward_gold", "reward_proxy", "length", "repetition", "truncated_share",
)  # fmt: skip
"""First columns of one seed's policy; all others of policies.json follow."""

METRICS = {
    "win_rate": "win rate against SFT",
    "gain_gold": "gold gain, standard deviations",
    "gain_proxy": "proxy gain, standard deviations",
    "kl": "KL to SFT, nats",
}
"""Metrics drawn over seeds, with their titles; averaged are all that have an interval or error of their own, too."""

STEP, WIDTH = 0.05, 0.5
"""Distance of the dots of two seeds, and its maximum over all seeds; policies have distance 1."""


@dataclass(frozen=True)
class SeedResult:
    """Result of one seed.

    Attributes:
        degenerate_count: policy → degenerate responses of its last update, see `tasks.rl.hacking.response_metrics`;
            0 for DPO, which samples nothing while it trains.
        wins: policy → prompt → win rate, see `wins_by_prompt`.
        detectors: policy → the detectors of reward hacking that fired.
    """

    table: Table
    degenerate_count: Mapping[str, float]
    detectors: Mapping[str, Sequence[str]]
    wins: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


Results = Mapping[int, SeedResult | RLHFError]
"""Seed → its result, or the error that ended it."""


def load_seed_result(artifacts: Path) -> SeedResult:
    """Load the results that the stages wrote under one seed."""

    def read(path: str) -> Any:
        return json.loads((artifacts / path).read_text(encoding="utf-8"))

    table: Table = read("evaluate/policies.json")
    with (artifacts / "evaluate" / "responses.jsonl").open(encoding="utf-8") as file:
        wins = wins_by_prompt(map(json.loads, file), REFERENCE)
    metrics = {policy: read(f"{policy}/metrics.json") for policy in table if policy != REFERENCE}
    return SeedResult(
        table,
        {policy: float(own.get("degenerate_count", 0.0)) for policy, own in metrics.items()},
        {
            policy: list(dict.fromkeys(finding["detector"] for finding in own))
            for policy, own in read("evaluate/findings.json").items()
        },
        {policy: wins[policy] for policy in table if policy in wins},
    )


def collapse_reason(
    row: Mapping[str, float], degenerate_count: float, others: Sequence[Mapping[str, float]] = ()
) -> str | None:
    """Reason why a policy collapsed, or None.

    It is clearly worse than SFT, or than at least half of the `others`, the same policy under two or more other seeds,
    or its last responses are degenerate.
    """
    reasons = []
    interval = f"{row['win_rate_low']:.0%}–{row['win_rate_high']:.0%}"
    typical = median_low(other["win_rate_low"] for other in others) if len(others) > 1 else 0.0
    if row["win_rate_high"] < 0.5:
        reasons.append(f"its win rate's whole interval, {interval}, lies below one half")
    elif row["win_rate_high"] < typical:
        reasons.append(
            f"its win rate's whole interval, {interval}, lies below those of other seeds, which begin at {typical:.0%}"
        )
    if degenerate_count > 0:
        reasons.append("its last responses are all empty, all the same, or all without an end")
    return "; ".join(reasons) or None


def summarise_seeds(results: Results) -> dict[str, Any]:
    """Summarise all seeds as JSON types.

    `policies` gives each policy a `summary`, metric → statistics over seeds (`low` and `high` are the 95 % interval of
    the mean, null for one seed), and its `seeds`, seed → metrics with `detectors`, those that fired, and `collapsed`,
    the reason or null; `collapsed` and `failed` hold a sentence for each. `wins` gives each policy, against ½, and
    `differences` each two policies ("ppo-grpo"), against 0, the win rate over seeds and prompts: see `_over_prompts`.

    Means are over every evaluated seed, collapsed ones included: leaving those out would select seeds by their result.
    A training that failed with a TrainingError counts as collapsed, too.
    """
    trained = {seed: result for seed, result in results.items() if isinstance(result, SeedResult)}
    errors = {seed: result for seed, result in results.items() if isinstance(result, RLHFError)}
    policies = dict.fromkeys(policy for result in trained.values() for policy in result.table if policy != REFERENCE)
    rows = {policy: {str(seed): _seed_row(trained, seed, policy) for seed in trained} for policy in policies}
    collapsed = [
        f"{policy}, seed {seed}: {row['collapsed']}"
        for policy, own in rows.items() for seed, row in own.items() if row["collapsed"]
    ]  # fmt: skip
    wins = {policy: [result.wins.get(policy, {}) for result in trained.values()] for policy in policies}
    wins = {policy: own for policy, own in wins.items() if len(own) > 1 and all(own)}
    diverged = [seed for seed, error in errors.items() if isinstance(error, TrainingError)]
    return {
        "seeds": list(results),
        "policies": {
            policy: {"summary": _summarise_metrics(list(own.values())), "seeds": own} for policy, own in rows.items()
        },
        "wins": {policy: _over_prompts(own, null=0.5) for policy, own in wins.items()},
        "differences": {
            f"{one}-{other}": _over_prompts(_subtract(wins[one], wins[other]), null=0.0)
            for one, other in combinations(wins, 2)
        },
        "collapsed": collapsed + [f"seed {seed}: its training failed" for seed in diverged],
        "failed": [f"seed {seed}: {error}" for seed, error in errors.items()],
    }


def _seed_row(trained: Mapping[int, SeedResult], seed: int, policy: str) -> dict[str, Any]:
    result = trained[seed]
    row, others = result.table[policy], [other.table[policy] for name, other in trained.items() if name != seed]
    return {key: row[key] for key in dict.fromkeys((*SEED_COLUMNS, *row)) if key in row} | {
        "detectors": " ".join(result.detectors[policy]),
        "collapsed": collapse_reason(row, result.degenerate_count[policy], others),
    }


def _summarise_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    own = [name for name in rows[0] if f"{name}_low" in rows[0] or f"{name}_stderr" in rows[0]]
    names = [name for name in dict.fromkeys((*METRICS, *own)) if all(name in row for row in rows)]
    return {name: _summarise_values([row[name] for row in rows]) for name in names}


def _summarise_values(values: Sequence[float]) -> dict[str, Any]:
    low = high = None
    if len(values) > 1:
        interval = t_interval(values)
        low, high = round(interval.low, DIGITS), round(interval.high, DIGITS)
    mean = round(sum(values) / len(values), DIGITS)
    return {"seeds": len(values), "mean": mean, "low": low, "high": high, "min": min(values), "max": max(values)}


def _subtract(one: SeedValues, other: SeedValues) -> list[dict[str, float]]:
    """Difference of two policies' win rates for each prompt of each seed."""
    return [{prompt: a[prompt] - b[prompt] for prompt in a} for a, b in zip(one, other, strict=True)]


def _over_prompts(values: SeedValues, *, null: float) -> dict[str, float]:
    """Mean, interval and p-value over seeds and prompts.

    Where each seed has its own prompts, also the standard deviations of the two variance components, and `detectable`,
    the difference that a test over so many seeds and prompts sees with 80 % power.
    """
    found = bootstrap_seeds(values, null=null)
    if any(own.keys() != values[0].keys() for own in values) and min(map(len, values)) > 1:
        between, within = seed_statistics.variance_components(values)
        size = {"seeds": len(values), "prompts": min(map(len, values))}
        detectable = seed_statistics.detectable_difference(between, within, **size)
        found |= {"seed_std": between**0.5, "prompt_std": within**0.5, "detectable": detectable}
    return {name: round(value, DIGITS) for name, value in found.items()}


def flat_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """Flatten the summary: `seeds.<policy>.<metric>_<statistic>`, and `seeds.wins.…` and `seeds.differences.…`."""
    over_prompts = flatten({f"seeds.{name}": summary[name] for name in ("wins", "differences")})
    return over_prompts | {
        f"seeds.{policy}.{metric}_{statistic}": value
        for policy, own in summary["policies"].items()
        for metric, values in own["summary"].items()
        for statistic, value in values.items()
        if value is not None
    }


def write_comparison(folder: Path, variants: Mapping[str, Table]) -> None:
    """Write variants.json (variant → policy → numbers), variants.csv (a row per variant and policy) and the plot."""
    write_json(folder / "variants.json", dict(variants))
    write_table(folder / "variants.csv", [
        {"variant": variant, "policy": policy} | {key: row[key] for key in VARIANT_COLUMNS if key in row}
        for variant, table in variants.items() for policy, row in table.items() if policy != REFERENCE
    ], ["variant", "policy", *VARIANT_COLUMNS])  # fmt: skip
    _plot_variants(folder / "reward_against_kl.svg", variants)


def write_summary(folder: Path, results: Results) -> None:
    """Write seeds.json (see `summarise_seeds`), seeds.csv (a row per policy and seed) and seeds.svg."""
    summary = summarise_seeds(results)
    write_json(folder / "seeds.json", summary)
    rows = [
        {"policy": policy, "seed": seed} | row
        for policy, own in summary["policies"].items() for seed, row in own["seeds"].items()
    ]  # fmt: skip
    columns = dict.fromkeys(("policy", "seed", *SEED_COLUMNS, *(name for row in rows for name in row)))
    write_table(folder / "seeds.csv", rows, list(columns))
    _plot_seeds(folder / "seeds.svg", summary)


def _plot_variants(path: Path, variants: Mapping[str, Table]) -> None:
    """Plot gain over SFT against √KL: a panel per judge, a colour per variant, a marker per policy.

    As Gao et al. 2022 (arXiv 2210.10760, section 3).
    """
    judges = [judge for judge in ("proxy", "gold") if judge in judges_of(next(iter(variants.values())))]
    policies = sorted({policy for table in variants.values() for policy in table if policy != REFERENCE})
    markers = dict(zip(policies, "osD^v*", strict=False))
    figure, panels = make_panels([f"by {judge}" for judge in judges], 5.2, share=True)
    for axes, judge in zip(panels, judges, strict=True):
        for colour, table in enumerate(variants.values()):
            for policy in policies:
                if row := table.get(policy):
                    axes.errorbar(
                        max(row["kl"], 0.0) ** 0.5, row[f"gain_{judge}"], yerr=1.96 * row[f"gain_{judge}_stderr"],
                        marker=markers[policy], color=f"C{colour}", capsize=2, linestyle="none",
                    )  # fmt: skip
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_xlabel("√KL to SFT, √nats")
    panels[0].set_ylabel("gain over SFT, standard deviations")
    keys = [panels[0].plot([], [], color=f"C{colour}", label=name)[0] for colour, name in enumerate(variants)]
    keys += [panels[0].plot([], [], color="grey", marker=markers[p], linestyle="none", label=p)[0] for p in policies]
    figure.legend(handles=keys, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    save_figure(figure, path)


def _plot_seeds(path: Path, summary: Mapping[str, Any]) -> None:
    """Plot a panel per metric: a dot per seed, a cross if it collapsed, and the mean with its interval."""
    policies = summary["policies"]
    metrics = [name for name in METRICS if any(name in own["summary"] for own in policies.values())]
    figure, panels = make_panels([METRICS[name] for name in metrics], 3.4)
    for axes, name in zip(panels, metrics, strict=True):
        for place, own in enumerate(policies.values()):
            _plot_policy(axes, place, name, own)
        axes.set(xticks=range(len(policies)), xlim=(-0.5, len(policies) - 0.5))
        axes.set_xticklabels(policies)
        axes.axhline(0.5 if name == "win_rate" else 0.0, color="grey", linewidth=0.8)
    save_figure(figure, path)


def _plot_policy(axes: Any, place: int, name: str, own: Mapping[str, Any]) -> None:
    summary, count = own["summary"][name], len(own["seeds"])
    for number, (seed, row) in enumerate(own["seeds"].items()):
        x = place + min(STEP, WIDTH / count) * (number - (count - 1) / 2)
        axes.plot(x, row[name], marker="x" if row["collapsed"] else "o", color=f"C{place}", alpha=0.7)
        if row["collapsed"]:
            axes.annotate(f" seed {seed}", (x, row[name]), fontsize="x-small")
    mean, low, high = summary["mean"], summary["low"], summary["high"]
    ends = None if low is None else [[mean - low], [high - mean]]
    axes.errorbar(place + 0.35, mean, yerr=ends, marker="D", color="black", capsize=3)


def make_panels(titles: Sequence[str], width: float, *, share: bool = False) -> tuple[Any, list[Any]]:
    """A figure with a panel per title, in a row."""
    from matplotlib.figure import Figure  # slow to import

    count = max(len(titles), 1)
    figure = Figure(figsize=(width * count, 3.8), layout="constrained")
    panels = figure.subplots(1, count, sharex=share, sharey=share, squeeze=False)[0][: len(titles)]
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(panels)


def save_figure(figure: Any, path: Path) -> None:
    """Save as SVG; equal data gives equal bytes."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})
