"""What the table says, in a sentence or two that need no glossary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tasks.evals.compare import REFERENCE, Table

__all__ = ["NAMES", "Verdict", "judge_table", "percent"]

NAMES = {"sft": "SFT", "ppo": "PPO", "grpo": "GRPO", "dpo": "DPO"}

FEW = 50
"""Below this many prompts the bootstrap interval itself is rough, and the verdict says so."""

DRIFT = 0.2
"""A mean length that differs from the reference's by more than this share is part of the verdict: judges of every kind
are swayed by length (Singhal et al. 2023, arXiv 2310.03716)."""


@dataclass(frozen=True)
class Verdict:
    """The conclusion.

    Attributes:
        gold: who beats the reference by the gold judge, with intervals.
        agreement: whether the trained-on reward and the gold judge tell the same story.
        suspects: policies that the proxy puts clearly above the reference and the gold judge does not.
        drift: policies whose responses are much shorter or longer than the reference's, or nothing.
        caution: a limit of this comparison, or nothing.
    """

    gold: str
    agreement: str
    suspects: tuple[str, ...]
    drift: str
    caution: str


def judge_table(table: Table) -> Verdict:
    """The verdict: better or worse means that the whole 95 % interval of the win rate lies above or below one half."""
    policies = [policy for policy in table if policy != REFERENCE]
    side = {policy: _side(table[policy], "win_rate") for policy in policies}
    proxy = {policy: _side(table[policy], "win_rate_proxy") for policy in policies}
    suspects = tuple(policy for policy in policies if proxy[policy] > 0 and side[policy] <= 0)
    missed = tuple(policy for policy in policies if proxy[policy] <= 0 and side[policy] > 0)
    n = int(next(iter(table.values()))["n"])
    caution = f"Only {n} prompts were compared, so these intervals are rough." if n < FEW else ""
    return Verdict(_gold_sentence(table, side), _agreement(suspects, missed), suspects, _drift(table), caution)


def percent(share: float) -> str:
    """A share as whole percent, without the sign."""
    return f"{100 * share:.0f}"


def _side(row: dict[str, float], prefix: str) -> int:
    """1 where the interval lies above one half, −1 below it, 0 where it holds one half."""
    return int(row[f"{prefix}_low"] > 0.5) - int(row[f"{prefix}_high"] < 0.5)


def _gold_sentence(table: Table, side: dict[str, int]) -> str:
    verbs = {
        1: ("beats SFT", "beat SFT"),
        0: ("is not clearly better or worse than SFT", "are not clearly better or worse than SFT"),
        -1: ("is worse than SFT", "are worse than SFT"),
    }
    parts = []
    for value, (one, many) in verbs.items():
        group = [policy for policy in side if side[policy] == value]
        if group:
            named = _list([f"{_name(policy)} ({_interval(table[policy])})" for policy in group])
            parts.append(f"{named} {one if len(group) == 1 else many}")
    if not parts:
        return "There is no policy to compare with SFT."
    explained = "; ".join(parts).replace("(", "(preferred on ", 1).replace(", interval", " of prompts, 95% interval", 1)
    return f"By the gold judge, {explained}."


def _interval(row: dict[str, float]) -> str:
    low, high = percent(row["win_rate_low"]), percent(row["win_rate_high"])
    return f"{percent(row['win_rate'])}%, interval {low}–{high}%"


def _agreement(suspects: Sequence[str], missed: Sequence[str]) -> str:
    parts = []
    if suspects:
        verb = "is" if len(suspects) == 1 else "are"
        parts.append(
            f"Proxy and gold disagree: by the proxy reward, which PPO and GRPO maximise, {_list(_names(suspects))} "
            f"{verb} clearly better than SFT; the gold judge does not confirm it. Suspect reward hacking, "
            "and read the samples."
        )
    if missed:
        verb = "is" if len(missed) == 1 else "are"
        parts.append(
            f"{_list(_names(missed))} {verb} clearly better by the gold judge, but not by the proxy reward, which PPO "
            "and GRPO maximise."
        )
    agree = "The proxy reward, which PPO and GRPO maximise, and the gold judge agree on which policies beat SFT."
    return " ".join(parts) or agree


def _drift(table: Table) -> str:
    usual = table[REFERENCE]["length"]
    changes = {policy: row["length"] / usual - 1 for policy, row in table.items()} if usual else {}
    parts = [
        f"{_name(policy)}'s are {percent(abs(change))}% {'longer' if change > 0 else 'shorter'}"
        for policy, change in changes.items()
        if abs(change) > DRIFT
    ]
    return f"Responses changed in length, which may be part of the gain: {_list(parts)} than SFT's." if parts else ""


def _names(policies: Sequence[str]) -> list[str]:
    return [_name(policy) for policy in policies]


def _name(policy: str) -> str:
    return NAMES.get(policy, policy)


def _list(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
