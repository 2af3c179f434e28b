"""Comparison of pipeline variants: a table, and a plot of reward against KL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tasks.core.files import write_json, write_table
from tasks.evals.compare import REFERENCE, Table, judges_of

__all__ = ["VARIANT_COLUMNS", "plot_comparison", "write_comparison"]

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
