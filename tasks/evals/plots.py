"""Figures as inline SVG that take colours, font and width from the page; equal data gives equal bytes.

Figures are drawn in placeholder colours, which are then replaced by CSS variables.
"""

import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tasks.core.rows import write_table
from tasks.core.text_stats import word_count
from tasks.evals.compare import JUDGE_NAMES, REFERENCE, ScoredResponse, Table, by_policy, judges_of, win_rates_of
from tasks.evals.overoptimisation import BEST_OF_N, curve
from tasks.evals.report_text import display_name
from tasks.evals.statistics import wilson_interval

__all__ = [
    "accuracy_by_margin", "calibration", "curves", "length_counts", "lengths", "overoptimisation", "reward_against_kl",
    "win_rates", "write_plot_data",
]  # fmt: skip

Series = Mapping[str, Sequence[tuple[float, float]]]
"""Policy → (x, y) points in the order of x."""

INK, FAINT = "#000001", "#000002"
POLICY_COLOURS = {"sft": "#000003", "ppo": "#000004", "grpo": "#000005", "dpo": "#000006"}
CSS_VARIABLES = {INK: "--ink", FAINT: "--line"} | {colour: f"--{name}" for name, colour in POLICY_COLOURS.items()}
LINE_STYLES = {"sft": ":", "ppo": "-", "grpo": "--", "dpo": "-."}
JUDGE_MARKERS = {"gold": "o", "judge": "^", "vader": "s", "proxy": "D"}
FIT_STYLES = {"proxy": "--", "gold": "-"}
"""Judge → line style of its fitted over-optimisation curve."""

LABEL_WIDTH = 0.12
"""Fraction of the width for a policy's name and its gap."""

SIZE = (4.6, 3.2)
"""Inches at 72 points: 331 wide, so that text of 10 points is still about 10 pixels on a phone."""

MAX_BARS = 40
"""With more different lengths than this, several share a bar."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT,
    "axes.facecolor": "none", "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "axes.unicode_minus": True, "grid.color": FAINT, "grid.linewidth": 0.6,
    "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "legend.frameon": False, "legend.fontsize": 9, "lines.linewidth": 1.8, "figure.constrained_layout.use": True,
}  # fmt: skip


def length_counts(records: Sequence[ScoredResponse]) -> dict[str, list[tuple[int, int]]]:
    """Count each policy's responses per number of words, from the shortest to the longest, zeros included."""
    counts = {
        policy: Counter(word_count(record.response) for record in own) for policy, own in by_policy(records).items()
    }
    return {
        policy: [(length, own[length]) for length in range(min(own), max(own) + 1)] for policy, own in counts.items()
    }


def write_plot_data(folder: Path, table: Table, records: Sequence[ScoredResponse]) -> None:
    """Write the numbers of three figures as CSV: reward_against_kl, win_rates and lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    judges = judges_of(table)
    write_table(folder / "reward_against_kl.csv", [
        {"policy": policy, "sqrt_kl": _distance(row)} | {f"gain_{judge}": row[f"gain_{judge}"] for judge in judges}
        for policy, row in table.items()
    ])  # fmt: skip
    write_table(folder / "win_rates.csv", [
        {"policy": policy, "judge": judge, "win_rate": row[key], "low": row[f"{key}_low"], "high": row[f"{key}_high"]}
        for policy, row in table.items() if policy != REFERENCE
        for judge, key in judges.items()
    ], columns=("policy", "judge", "win_rate", "low", "high"))  # fmt: skip
    write_table(folder / "lengths.csv", [
        {"policy": policy, "words": words, "responses": count}
        for policy, counts in length_counts(records).items() for words, count in counts
    ])  # fmt: skip


@rc_context(STYLE)
def win_rates(table: Table) -> str:
    """Plot each policy's win rate against the reference by each judge, with its 95 % interval, in percent."""
    figure, (axes,) = _subplots(size=(SIZE[0], 1.3 + 0.65 * max(1, len(table) - 1)))
    policies = [policy for policy in table if policy != REFERENCE]
    judges = win_rates_of(table)
    offsets = [0.22 * (place - (len(judges) - 1) / 2) for place in range(len(judges))]
    axes.axvline(50, color=INK, linewidth=1, linestyle=":")
    for (judge, prefix), offset in zip(judges.items(), offsets, strict=True):
        for place, policy in enumerate(policies):
            if prefix in (row := table[policy]):
                low, mean, high = (100 * row[key] for key in (f"{prefix}_low", prefix, f"{prefix}_high"))
                axes.plot([low, high], [place + offset] * 2, color=_colour(policy), linewidth=2)
                axes.plot(mean, place + offset, **_marker(judge, policy))
        axes.plot([], [], **_marker(judge, None), label=JUDGE_NAMES[judge])
    axes.set_yticks(range(len(policies)), [display_name(policy) for policy in policies])
    axes.set_ylim(len(policies) - 0.45, -0.55)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("win rate against SFT, %")
    _legend_above(axes, 3)
    return _svg("win_rates", figure)


@rc_context(STYLE)
def reward_against_kl(table: Table) -> str:
    """Plot the gain over the reference by each judge against √KL, in standard deviations of the reference's scores."""
    figure, (axes,) = _subplots(size=(SIZE[0], 3.9))
    distance = {policy: _distance(row) for policy, row in table.items()}
    judges = list(judges_of(table))
    offset = 0.012 * max(distance.values())
    tops: dict[str, float] = {}
    for policy in (policy for policy in table if policy != REFERENCE):
        for number, judge in enumerate(judges):
            place = distance[policy] + offset * (number - (len(judges) - 1) / 2)
            gain, error = (table[policy][f"gain_{judge}{end}"] for end in ("", "_stderr"))
            axes.errorbar(place, gain, yerr=1.96 * error, elinewidth=1.4, **_marker(judge, policy))
            tops[policy] = max(tops.get(policy, gain), gain + 1.96 * error)
    axes.plot(0, 0, marker="o", color=_colour(REFERENCE), markersize=7, clip_on=False)
    axes.annotate(display_name(REFERENCE), (0, 0), (8, 4), textcoords="offset points", fontsize=9)
    axes.set_xlim(0, 1.15 * max(distance.values()) or 1.0)
    _label_policies(axes, {policy: (distance[policy], top) for policy, top in tops.items()})
    _setup_gain_axes(axes, judges)
    return _svg("reward_against_kl", figure)


@rc_context(STYLE)
def overoptimisation(rows: Sequence[Mapping[str, str]], fits: Mapping[str, Any]) -> dict[str, str]:
    """Plot gain by proxy and gold against √KL for each method, with 95 % intervals and fits, on the same scales.

    A dotted line marks the maximum of the gold curve.
    """
    ends = [
        (float(row[f"gain_{judge}"]), 1.96 * float(row[f"gain_{judge}_stderr"])) for row in rows for judge in FIT_STYLES
    ]
    low, high = min(0.0, *(gain - half for gain, half in ends)), max(gain + half for gain, half in ends)
    max_distance = max(float(row["distance"]) for row in rows)

    svgs = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        figure, (axes,) = _subplots(size=(SIZE[0], 3.4))
        for judge in FIT_STYLES:
            _draw_points(axes, own, judge, REFERENCE if method == BEST_OF_N else method)
            if fit := fits.get(method, {}).get(judge):
                _draw_fit(axes, fit, judge, max(float(row["distance"]) for row in own))
        axes.set_xlim(0, 1.05 * max_distance)
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        _setup_gain_axes(axes, list(FIT_STYLES))
        svgs[method] = _svg(f"overoptimisation_{method}", figure)
    return svgs


@rc_context(STYLE)
def curves(name: str, series: Series, *, y_label: str) -> str:
    """Plot a training metric over updates, one line per policy."""
    figure, (axes,) = _subplots()
    for policy, points in series.items():
        x, y = zip(*points, strict=True)
        marker = "o" if len(points) < 3 else None
        axes.plot(
            x, y, color=_colour(policy), linestyle=LINE_STYLES.get(policy, "-"), marker=marker,
            label=display_name(policy),
        )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("update")
    axes.set_ylabel(y_label)
    _legend_above(axes, len(series))
    return _svg(f"curve_{name}", figure)


@rc_context(STYLE)
def accuracy_by_margin(rows: Sequence[Mapping[str, str]]) -> str:
    """Plot the reward model's accuracy by rating margin with its 95 % interval, beside the raters' agreement."""
    figure, (axes,) = _subplots()
    places = range(len(rows))
    columns = (("accuracy", "reward model", "o", "-"), ("ceiling", "a single rater", "s", "--"))
    for column, label, marker, line in columns:
        points = [(place, 100 * float(row[column])) for place, row in enumerate(rows) if row.get(column)]
        if points:
            x, y = zip(*points, strict=True)
            colour = POLICY_COLOURS["ppo"] if column == "accuracy" else POLICY_COLOURS["grpo"]
            axes.plot(x, y, color=colour, marker=marker, linestyle=line, label=label)
    for place, row in enumerate(rows):
        if row["accuracy"]:
            _draw_share_interval(axes, place, float(row["accuracy"]), int(row["pairs"]))
    axes.axhline(50, color=INK, linewidth=1, linestyle=":")
    axes.set_xticks(places, [f"{row['bucket']}\nn={row['pairs']}" for row in rows], fontsize=9)
    axes.set_xlabel("difference of the two mean ratings, points")
    axes.set_ylabel("pairs ordered right, %")
    axes.set_ylim(top=101)
    _legend_above(axes, 2)
    return _svg("accuracy_by_margin", figure)


@rc_context(STYLE)
def calibration(rows: Sequence[Mapping[str, str]]) -> str:
    """Plot predicted against observed probability with its 95 % interval; the area of a point shows its pairs."""
    figure, (axes,) = _subplots()
    predicted = [100 * float(row["predicted"]) for row in rows]
    observed = [100 * float(row["observed"]) for row in rows]
    counts = [float(row["count"]) for row in rows]
    low = min([*predicted, *observed])
    axes.plot([low, 100], [low, 100], color=INK, linewidth=1, linestyle=":", label="perfectly calibrated")
    axes.plot(predicted, observed, color=POLICY_COLOURS["ppo"], label="reward model")
    area = [20 + 100 * count / max(counts) for count in counts]
    axes.scatter(predicted, observed, s=area, color=POLICY_COLOURS["ppo"], zorder=3)
    for x, row in zip(predicted, rows, strict=True):
        _draw_share_interval(axes, x, float(row["observed"]), int(row["count"]))
    axes.set_xlabel("how sure the model says it is, %")
    axes.set_ylabel("how often people agree, %")
    _legend_above(axes, 2)
    return _svg("calibration", figure)


@rc_context(STYLE)
def lengths(counts: Mapping[str, Sequence[tuple[int, int]]]) -> str:
    """Plot a histogram of `length_counts` per policy, with the mean marked."""
    figure, rows = _subplots(len(counts), size=(SIZE[0], 0.6 + 0.75 * len(counts)))
    longest = max(length for points in counts.values() for length, _ in points)
    width = longest // MAX_BARS + 1
    edges = [width * place - 0.5 for place in range(longest // width + 2)]
    for axes, (policy, points) in zip(rows, counts.items(), strict=True):
        x, y = zip(*points, strict=True)
        axes.hist(x, bins=edges, weights=y, color=_colour(policy), rwidth=0.85)
        mean = sum(length * count for length, count in points) / sum(y)
        axes.axvline(mean, color=INK, linewidth=1, linestyle=":")
        axes.set_ylabel(display_name(policy), rotation=0, ha="right", va="center")
        axes.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    rows[-1].set_xlabel("words in the response")
    return _svg("lengths", figure)


def _distance(row: Mapping[str, float]) -> float:
    """√KL, the distance from SFT; an estimate of the KL may be below 0."""
    return max(row["kl"], 0.0) ** 0.5


def _draw_share_interval(axes: Axes, place: float, share: float, n: int) -> None:
    """Draw the 95 % Wilson interval of a share of n pairs, in percent."""
    interval = wilson_interval(share, n)
    axes.plot([place, place], [100 * interval.low, 100 * interval.high], color=POLICY_COLOURS["ppo"], linewidth=1.2)


def _draw_points(axes: Axes, rows: Sequence[Mapping[str, str]], judge: str, policy: str) -> None:
    """Draw points with their 95 % intervals."""
    x = [float(row["distance"]) for row in rows]
    y = [float(row[f"gain_{judge}"]) for row in rows]
    halves = [1.96 * float(row[f"gain_{judge}_stderr"]) for row in rows]
    axes.errorbar(x, y, yerr=halves, **_marker(judge, policy) | {"markersize": 5}, elinewidth=1.2)


def _draw_fit(axes: Axes, fit: Mapping[str, Any], judge: str, max_distance: float) -> None:
    """Draw the fitted curve up to the farthest point, and the peak of gold if it lies before it."""
    line = np.linspace(0, max_distance, 100)
    gain = curve(fit["form"], fit["alpha"]["mean"], fit["beta"]["mean"], line)
    axes.plot(line, gain, color=INK, linestyle=FIT_STYLES[judge], linewidth=1.2)
    if judge == "gold" and fit["peak"] is not None and fit["peak"] < max_distance:
        axes.axvline(fit["peak"], color=INK, linestyle=":", linewidth=1.4)


def _setup_gain_axes(axes: Axes, judges: Sequence[str]) -> None:
    """Set the axes, legend and zero line of a plot of gain against √KL."""
    axes.axhline(0, color=INK, linewidth=1, linestyle=":")
    for judge in judges:
        axes.plot([], [], **_marker(judge, None), label=JUDGE_NAMES[judge])
    axes.set_xlabel("√KL to SFT (KL in nats per response)")
    axes.set_ylabel("gain over SFT, SFT's std. dev.")
    _legend_above(axes, 3)


def _label_policies(axes: Axes, tops: Mapping[str, tuple[float, float]]) -> None:
    """Label each policy above its highest point; overlapping labels are spread."""
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top + 0.18 * (top - bottom))
    shares = _spread_labels([x / axes.get_xlim()[1] for x, _ in tops.values()])
    for (policy, highest), share in zip(tops.items(), shares, strict=True):
        line = {"arrowstyle": "-", "color": _colour(policy), "linewidth": 0.8, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            display_name(policy), highest, (share, 0.94), textcoords="axes fraction", fontsize=9, ha="center",
            arrowprops=line,
        )  # fmt: skip


def _spread_labels(shares: Sequence[float]) -> list[float]:
    """Move label positions as little as needed for a gap of `LABEL_WIDTH`, and half of it at both ends."""
    order = sorted(range(len(shares)), key=lambda place: shares[place])
    positions = list(shares)
    limit = 1 + LABEL_WIDTH / 2
    for place in reversed(order):
        positions[place] = limit = min(positions[place], limit - LABEL_WIDTH)
    limit = -LABEL_WIDTH / 2
    for place in order:
        positions[place] = limit = max(positions[place], limit + LABEL_WIDTH)
    return positions


def _subplots(rows: int = 1, *, size: tuple[float, float] = SIZE) -> tuple[Figure, list[Axes]]:
    """Make a figure of axes one above the other."""
    figure = Figure(figsize=size, facecolor="none")
    FigureCanvasSVG(figure)
    return figure, list(figure.subplots(rows, 1, sharex=True, sharey=True, squeeze=False)[:, 0])


def _svg(name: str, figure: Figure) -> str:
    """Render the SVG with CSS variables for colours and identifiers that are unique to the figure."""
    file = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg")
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\1{name}-", text)
    for colour, variable in CSS_VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1).strip()


def _marker(judge: str, policy: str | None) -> dict[str, Any]:
    """Marker style: filled for the judges that training never saw, hollow for the proxy."""
    colour = _colour(policy) if policy else INK
    fill = "none" if judge == "proxy" else colour
    return {
        "color": colour, "marker": JUDGE_MARKERS[judge], "markerfacecolor": fill, "markersize": 6, "linestyle": "none",
    }  # fmt: skip


def _colour(policy: str) -> str:
    return POLICY_COLOURS.get(policy, INK)


def _legend_above(axes: Axes, columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, columnspacing=1.2, handlelength=1.8)
