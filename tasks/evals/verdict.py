"""Plain-language summary of the table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tasks.evals.compare import REFERENCE, Table
from tasks.evals.findings import proxy_gain_unconfirmed

__all__ = ["DISPLAY_NAMES", "Summary", "best_policy", "summarise_table", "join_and", "format_percent"]

DISPLAY_NAMES = {"sft": "SFT", "ppo": "PPO", "grpo": "GRPO", "dpo": "DPO", "best_of_n": "best of n"}

MIN_PROMPTS = 50
"""With fewer prompts than this the bootstrap interval is rough, and the summary warns."""

MAX_INCONSISTENT = 0.5
"""If the LLM judge decides a larger share of pairs than this by their order, the summary warns."""

MAX_LENGTH_DRIFT = 0.2
"""A mean length that differs from the reference's by more than this share is reported: judges of every kind
are swayed by length (Singhal et al. 2023, arXiv 2310.03716)."""


@dataclass(frozen=True)
class Summary:
    """Summary of the evaluation.

    Attributes:
        winner: best policy, and how certain that is.
        gold: policies that beat the reference by the gold judge, with intervals.
        agreement: whether the proxy reward and the gold judge agree.
        suspects: policies that the proxy puts clearly above the reference and the gold judge does not, or far less.
        drift: policies whose responses are much shorter or longer than the reference's, or nothing.
        caution: limits of this comparison, or nothing.
    """

    winner: str
    gold: str
    agreement: str
    suspects: tuple[str, ...]
    drift: str
    caution: str


def summarise_table(table: Table, flagged: Collection[str] = ()) -> Summary:
    """Summarise the table; better or worse means that the whole 95 % interval of the win rate is above or below ½.

    Args:
        flagged: policies with signs of reward hacking.
    """
    policies = [policy for policy in table if policy != REFERENCE]
    significance = {policy: _significance(table[policy], "win_rate") for policy in policies}
    proxy = {policy: _significance(table[policy], "win_rate_proxy") for policy in policies}
    suspects = tuple(policy for policy in policies if proxy_gain_unconfirmed(table[policy]))
    missed = tuple(policy for policy in policies if proxy[policy] <= 0 and significance[policy] > 0)
    return Summary(
        winner=_winner_sentence(table, significance, flagged),
        gold=_gold_sentence(table, significance),
        agreement=_agreement_sentence(suspects, missed),
        suspects=suspects,
        drift=_drift_sentence(table),
        caution=_caution_sentence(table),
    )


def best_policy(table: Table) -> str | None:
    """Policy with the highest lower bound of the gold judge's win rate; None if there is only the reference."""
    policies = [policy for policy in table if policy != REFERENCE]
    return max(policies, key=lambda policy: table[policy]["win_rate_low"], default=None)


def format_percent(share: float) -> str:
    """Format a share as whole percent, without the percent sign."""
    return f"{100 * share:.0f}"


def join_and(items: Sequence[str]) -> str:
    """Join as in a sentence: a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _winner_sentence(table: Table, significance: Mapping[str, int], flagged: Collection[str]) -> str:
    """Sentence about the best policy by lower bound, and those whose intervals overlap its interval."""
    first = best_policy(table)
    if first is None or significance[first] <= 0:
        return "No policy clearly beats SFT." if first else "There is no policy to compare with SFT."
    row = table[first]
    overlapping = [policy for policy in significance if policy != first and table[policy]["win_rate_high"] >= row["win_rate_low"]]
    rate = f"preferred to SFT on {format_percent(row['win_rate'])}% of prompts"
    if first in flagged:
        return f"{_display_name(first)} is not to be trusted: {rate}, but with signs of reward hacking. Read its samples first."
    if not overlapping:
        return f"{_display_name(first)} is best: {rate}."
    return f"{_display_name(first)} comes first: {rate}. {join_and(_display_names(overlapping))} may be as good: the intervals overlap."


def _caution_sentence(table: Table) -> str:
    parts = []
    n = int(next(iter(table.values()))["n"])
    if n < MIN_PROMPTS:
        parts.append(f"Only {n} prompts were compared, so these intervals are rough.")
    inconsistent = [policy for policy, row in table.items() if row.get("judge_inconsistent", 0.0) > MAX_INCONSISTENT]
    if inconsistent:
        parts.append(
            f"Do not rely on the LLM judge for {join_and(_display_names(inconsistent))}: on more than half of the prompts it preferred "
            "another response once the two had changed places."
        )
    return " ".join(parts)


def _significance(row: dict[str, float], prefix: str) -> int:
    """Significance of a win rate: 1 if its interval is above ½, −1 if below, 0 if it contains ½."""
    return int(row[f"{prefix}_low"] > 0.5) - int(row[f"{prefix}_high"] < 0.5)


def _gold_sentence(table: Table, significance: dict[str, int]) -> str:
    verbs = {
        1: ("beats SFT", "beat SFT"),
        0: ("is not clearly better or worse than SFT", "are not clearly better or worse than SFT"),
        -1: ("is worse than SFT", "are worse than SFT"),
    }
    parts = []
    for value, (one, many) in verbs.items():
        group = [policy for policy in significance if significance[policy] == value]
        if group:
            policies = join_and([f"{_display_name(policy)} ({_win_rate_interval(table[policy])})" for policy in group])
            parts.append(f"{policies} {one if len(group) == 1 else many}")
    if not parts:
        return "There is no policy to compare with SFT."
    explained = "; ".join(parts).replace("(", "(preferred on ", 1).replace(", interval", " of prompts, 95% interval", 1)
    return f"By the gold judge, {explained}."


def _win_rate_interval(row: dict[str, float]) -> str:
    low, high = format_percent(row["win_rate_low"]), format_percent(row["win_rate_high"])
    return f"{format_percent(row['win_rate'])}%, interval {low}–{high}%"


def _agreement_sentence(suspects: Sequence[str], missed: Sequence[str]) -> str:
    parts = []
    if suspects:
        verb = "is" if len(suspects) == 1 else "are"
        parts.append(
            f"Proxy and gold disagree: by the proxy reward, which PPO and GRPO maximise, {join_and(_display_names(suspects))} "
            f"{verb} clearly better than SFT; the gold judge does not confirm it, or at most half of the gain. Suspect "
            "reward hacking, and read the samples."
        )
    if missed:
        verb = "is" if len(missed) == 1 else "are"
        parts.append(
            f"{join_and(_display_names(missed))} {verb} clearly better by the gold judge, but not by the proxy reward, which PPO "
            "and GRPO maximise."
        )
    agree = "The proxy reward, which PPO and GRPO maximise, and the gold judge agree on which policies beat SFT."
    return " ".join(parts) or agree


def _drift_sentence(table: Table) -> str:
    reference_length = table[REFERENCE]["length"]
    changes = {policy: row["length"] / reference_length - 1 for policy, row in table.items()} if reference_length else {}
    parts = [
        f"{_display_name(policy)}'s are {format_percent(abs(change))}% {'longer' if change > 0 else 'shorter'}"
        for policy, change in changes.items()
        if abs(change) > MAX_LENGTH_DRIFT
    ]
    return f"Responses changed in length, which may be part of the gain: {join_and(parts)} than SFT's." if parts else ""


def _display_names(policies: Sequence[str]) -> list[str]:
    return [_display_name(policy) for policy in policies]


def _display_name(policy: str) -> str:
    return DISPLAY_NAMES.get(policy, policy)
