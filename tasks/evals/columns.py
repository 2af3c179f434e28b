"""The columns of the report's table: a column is shown where the evaluation has its key."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tasks.evals.compare import REFERENCE, Table
from tasks.evals.verdict import percent

__all__ = ["COLUMNS", "Cell", "Column", "cells", "columns_of", "signed"]

Row = Mapping[str, float]
Cell = tuple[str, str]
"""What a cell says, and below it in small print."""


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: of the table.
        heading: its lines.
        show: the number as text.
        meaning: for readers who do not know it; "" where an earlier column or the judge's own entry has told.
        small: what stands below the number, given the row and the key.
    """

    key: str
    heading: tuple[str, ...]
    show: Callable[[float], str]
    meaning: str = ""
    small: Callable[[Row, str], str] = lambda _row, _key: ""


def signed(value: float) -> str:
    """Two decimals with a sign, as typographers write it; a value that rounds to 0 has none."""
    text = f"{value:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "−")


def _percent(value: float) -> str:
    return f"{percent(value)}%"


def _tenths(value: float) -> str:
    return f"{100 * value:.1f}%"


def _interval(row: Row, key: str) -> str:
    return f"{percent(row[f'{key}_low'])}–{percent(row[f'{key}_high'])}" if f"{key}_low" in row else ""


def _error(row: Row, key: str) -> str:
    return f"± {row[f'{key}_stderr']:.2f}"


WIN_RATE = (
    "Share of prompts for which the judge prefers the policy's response to SFT's; ties count half. 50% means no "
    "difference. Below it the 95% interval: where the win rate would fall in 95 of 100 repetitions with other prompts "
    "of the same kind (bootstrap over prompts). It does not cover a second training run with another seed."
)

COLUMNS = (
    Column("win_rate", ("Win rate,", "gold judge"), _percent, WIN_RATE, _interval),
    Column("win_rate_judge", ("Win rate,", "LLM judge"), _percent, "", _interval),
    Column("win_rate_vader", ("Win rate,", "VADER"), _percent, "", _interval),
    Column("win_rate_proxy", ("Win rate,", "proxy"), _percent, "", _interval),
    Column(
        "accuracy_strict", ("Right,", "strict"), _percent,
        "Share of right answers where the answer must stand as the task asks for it.", _interval,
    ),
    Column(
        "accuracy_flexible", ("Right,", "flexible"), _percent,
        "Share of right answers where it may stand anywhere in the response.", _interval,
    ),
    Column(
        "success", ("Success",), _percent,
        "Share of conversations that reached their goal, as the environment says.", _interval,
    ),
    Column(
        "turns", ("Turns",), lambda value: f"{value:.1f}", "How often the policy spoke in a conversation, on average.",
    ),
    Column(
        "reward_gold", ("Gold", "rating"), signed,
        "The gold judge's score: the average rating it expects, on the scale on which people rated; of a judge of "
        "preferences, log-odds.",
    ),
    Column("vader", ("VADER",), signed),
    Column("reward_proxy", ("Proxy", "reward"), signed),
    Column(
        "kl", ("KL to SFT,", "nats"), lambda value: f"{value:z.2f}",
        "How far the policy moved from SFT: the average of log(probability under the policy ÷ probability under SFT) "
        "of a whole response, in nats (1 nat: about 2.7 times as likely). SFT itself has 0. Below it the standard "
        "error.", _error,
    ),
    Column(
        "unfamiliar", ("Un-", "familiar"), _percent,
        "Share of responses that lie far from what the reward model was fitted on, where its score is a guess.",
    ),
    Column("length", ("Words",), lambda value: f"{value:.1f}", "Per response, punctuation not counted."),
    Column("repetition", ("Repeats",), _tenths, "Share of a response's word pairs that it had already used."),
    Column(
        "distinct_2", ("Distinct", "pairs"), _percent,
        "Of all word pairs in all responses, the share that are different. A low value means that the policy says the "
        "same everywhere.",
    ),
    Column(
        "no_end_share", ("No end",), _percent,
        "Share of responses that were cut at the length limit because the policy had not finished.",
    ),
)  # fmt: skip
"""From left to right."""

RIGHT = Column("reward_gold", ("Right", "answers"), _percent, "Share of right answers: the gold judge's mean.")
"""What `reward_gold` is where the gold judge is the right answer."""


RULED = Column("reward_gold", ("Gold", "rule"), signed, "The mean of the rule that judges in place of people.")
"""What `reward_gold` is where `evaluate.gold_rule` is set."""


def columns_of(table: Table, *, rated: bool, ruled: bool = False) -> list[Column]:
    """Those that the table has numbers for.

    Args:
        rated: whether the gold judge is a model of people's ratings; else it is whether the answer is right.
        ruled: whether, where people did not rate, a rule judges in place of right answers.
    """
    known = {key for row in table.values() for key in row}
    unrated = RULED if ruled else RIGHT
    shown = [column if rated or column.key != RIGHT.key else unrated for column in COLUMNS]
    if "success" in known:
        known.discard(RIGHT.key)  # the same number
    return [column for column in shown if column.key in known]


def cells(table: Table, columns: Sequence[Column]) -> dict[str, list[Cell]]:
    """Policy → its cells; a dash where it has no number, and for the reference's win rates against itself."""
    return {policy: [_cell(policy, row, column) for column in columns] for policy, row in table.items()}


def _cell(policy: str, row: Row, column: Column) -> Cell:
    itself = policy == REFERENCE and column.key.startswith("win_rate")
    if itself or column.key not in row:
        return "–", ""
    return column.show(row[column.key]), column.small(row, column.key)
