"""Columns of the report's table; a column is shown if the evaluation has its key."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tasks.evals.compare import REFERENCE, Table
from tasks.evals.verdict import format_percent

__all__ = ["COLUMNS", "Cell", "Column", "cells", "columns_of", "format_signed"]

Row = Mapping[str, float]
Cell = tuple[str, str]
"""Text of a cell, and its small print."""


@dataclass(frozen=True)
class Column:
    """Column of the table.

    Attributes:
        key: of the table.
        heading: its lines.
        format_value: the number as text.
        meaning: explanation of the column; "" if an earlier column or the judge's entry explains it.
        subtext: small print below the number, from the row and the key.
    """

    key: str
    heading: tuple[str, ...]
    format_value: Callable[[float], str]
    meaning: str = ""
    subtext: Callable[[Row, str], str] = lambda _row, _key: ""


def format_signed(value: float) -> str:
    """Format with two decimals and a sign (true minus); a value that rounds to 0 has no sign."""
    text = f"{value:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "−")


def _whole_percent(value: float) -> str:
    return f"{format_percent(value)}%"


def _tenth_percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _interval_subtext(row: Row, key: str) -> str:
    return f"{format_percent(row[f'{key}_low'])}–{format_percent(row[f'{key}_high'])}" if f"{key}_low" in row else ""


def _stderr_subtext(row: Row, key: str) -> str:
    return f"± {row[f'{key}_stderr']:.2f}"


WIN_RATE = (
    "Share of prompts for which the judge prefers the policy's response to SFT's; ties count half. 50% means no "
    "difference. Below it the 95% interval: where the win rate would fall in 95 of 100 repetitions with other prompts "
    "of the same kind (bootstrap over prompts). It does not cover a second training run with another seed."
)

COLUMNS = (
    Column("win_rate", ("Win rate,", "gold judge"), _whole_percent, WIN_RATE, _interval_subtext),
    Column("win_rate_judge", ("Win rate,", "LLM judge"), _whole_percent, "", _interval_subtext),
    Column("win_rate_vader", ("Win rate,", "VADER"), _whole_percent, "", _interval_subtext),
    Column("win_rate_proxy", ("Win rate,", "proxy"), _whole_percent, "", _interval_subtext),
    Column(
        "accuracy_strict", ("Right,", "strict"), _whole_percent,
        "Share of right answers where the answer must stand as the task asks for it.", _interval_subtext,
    ),
    Column(
        "accuracy_flexible", ("Right,", "flexible"), _whole_percent,
        "Share of right answers where it may stand anywhere in the response.", _interval_subtext,
    ),
    Column(
        "success", ("Success",), _whole_percent,
        "Share of conversations that reached their goal, as the environment says.", _interval_subtext,
    ),
    Column(
        "turns", ("Turns",), lambda value: f"{value:.1f}", "How often the policy spoke in a conversation, on average.",
    ),
    Column(
        "reward_gold", ("Gold", "rating"), format_signed,
        "The gold judge's score: the average rating it expects, on the scale on which people rated; of a judge of "
        "preferences, log-odds.",
    ),
    Column("vader", ("VADER",), format_signed),
    Column("reward_proxy", ("Proxy", "reward"), format_signed),
    Column(
        "kl", ("KL to SFT,", "nats"), lambda value: f"{value:z.2f}",
        "How far the policy moved from SFT: the average of log(probability under the policy ÷ probability under SFT) "
        "of a whole response, in nats (1 nat: about 2.7 times as likely). SFT itself has 0. Below it the standard "
        "error.", _stderr_subtext,
    ),
    Column(
        "ood_share", ("Un-", "familiar"), _whole_percent,
        "Share of responses that lie far from what the reward model was fitted on, where its score is a guess.",
    ),
    Column("length", ("Words",), lambda value: f"{value:.1f}", "Per response, punctuation not counted."),
    Column("repetition", ("Repeats",), _tenth_percent, "Share of a response's word pairs that it had already used."),
    Column(
        "distinct_2", ("Distinct", "pairs"), _whole_percent,
        "Of all word pairs in all responses, the share that are different. A low value means that the policy says the "
        "same everywhere.",
    ),
    Column(
        "truncated_share", ("No end",), _whole_percent,
        "Share of responses that were cut at the length limit because the policy had not finished.",
    ),
)  # fmt: skip
"""Columns from left to right."""

CORRECT_COLUMN = Column("reward_gold", ("Right", "answers"), _whole_percent, "Share of right answers: the gold judge's mean.")
"""Column of `reward_gold` if the gold judge is the right answer."""


RULE_COLUMN = Column("reward_gold", ("Gold", "rule"), format_signed, "The mean of the rule that judges in place of people.")
"""Column of `reward_gold` if `evaluate.gold_rule` is set."""


def columns_of(table: Table, *, has_gold_judge: bool, has_gold_rule: bool = False) -> list[Column]:
    """Columns whose key is in the table.

    Args:
        has_gold_judge: whether the gold judge is a model of people's ratings; else it is whether the answer is right.
        has_gold_rule: whether, where people did not rate, a rule judges in place of right answers.
    """
    known = {key for row in table.values() for key in row}
    gold_column = RULE_COLUMN if has_gold_rule else CORRECT_COLUMN
    shown = [column if has_gold_judge or column.key != CORRECT_COLUMN.key else gold_column for column in COLUMNS]
    if "success" in known:
        known.discard(CORRECT_COLUMN.key)  # the same number
    return [column for column in shown if column.key in known]


def cells(table: Table, columns: Sequence[Column]) -> dict[str, list[Cell]]:
    """Cells of each policy; a dash for a missing number and for the win rates of the reference against itself."""
    return {policy: [_format_cell(policy, row, column) for column in columns] for policy, row in table.items()}


def _format_cell(policy: str, row: Row, column: Column) -> Cell:
    itself = policy == REFERENCE and column.key.startswith("win_rate")
    if itself or column.key not in row:
        return "–", ""
    return column.format_value(row[column.key]), column.subtext(row, column.key)
