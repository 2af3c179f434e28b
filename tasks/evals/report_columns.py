"""Columns of the report's tables of policies, and their cells."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tasks.evals.compare import REFERENCE, Table

__all__ = [
    "COLUMNS", "WIN_RATE_COLUMNS", "Column", "cells", "columns_of", "format_signed", "interval_subtext",
]  # fmt: skip

Row = Mapping[str, float]
Cell = tuple[str, str]
"""Text of a cell, and its small print."""


def format_signed(value: float) -> str:
    """Format with two decimals and a sign (true minus); a value that rounds to 0 has no sign."""
    text = f"{value:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "−")


def interval_subtext(row: Row, key: str) -> str:
    """Interval in whole percent, without the percent sign."""
    return f"{100 * row[f'{key}_low']:.0f}–{100 * row[f'{key}_high']:.0f}" if f"{key}_low" in row else ""


def _pairs_subtext(row: Row, key: str) -> str:
    return f"{interval_subtext(row, key)}, n={row[f'{key}_pairs']:,.0f}"


@dataclass(frozen=True)
class Column:
    """Column of the table; it is shown if the evaluation has its key.

    Attributes:
        meaning: explanation of the column; "" if an earlier column or the judge's entry explains it.
        subtext: small print below the number, from the row and the key.
    """

    key: str
    heading: tuple[str, ...]
    format_value: Callable[[float], str]
    meaning: str = ""
    subtext: Callable[[Row, str], str] = interval_subtext


PERCENT = "{:.0%}".format

WIN_RATE = (
    "Share of pairs of responses to one prompt in which the judge prefers the policy's to SFT's; ties count half. 50% "
    "means no difference. Below it the 95% interval: where the win rate would fall in 95 of 100 repetitions with other "
    "prompts of the same kind (bootstrap over prompts). It does not cover a second training run with another seed."
)

COLUMNS = (
    Column("win_rate", ("Win rate,", "gold judge"), PERCENT, WIN_RATE),
    Column("win_rate_judge", ("Win rate,", "LLM judge"), PERCENT),
    Column("win_rate_vader", ("Win rate,", "VADER"), PERCENT),
    Column("win_rate_proxy", ("Win rate,", "proxy"), PERCENT),
    Column(
        "accuracy_strict", ("Right,", "strict"), PERCENT,
        "Share of right answers where the answer must stand as the task asks for it.",
    ),
    Column(
        "accuracy_flexible", ("Right,", "flexible"), PERCENT,
        "Share of right answers where it may stand anywhere in the response.",
    ),
    Column(
        "accuracy_greedy", ("Right,", "greedy"), PERCENT,
        "The same of the answers that each model finds likeliest, token by token. What a policy gains only beside "
        "sampled answers of SFT is that it samples less widely.",
    ),
    Column(
        "pass_at_2", ("Right in", "one of 2"), PERCENT,
        "Probability that one of two sampled answers is right (pass@2, Chen et al. 2021, arXiv 2107.03374).",
    ),
    Column(
        "success", ("Success",), PERCENT,
        "Share of conversations that reached their goal, as the environment says.",
    ),
    Column(
        "turns", ("Turns",), "{:.1f}".format, "How often the policy spoke in a conversation, on average.",
    ),
    Column(
        "reward_gold", ("Gold", "rating"), format_signed,
        "The gold judge's score: the average rating it expects, on the scale on which people rated; of a judge of "
        "preferences, log-odds.",
    ),
    Column("vader", ("VADER",), format_signed),
    Column("reward_proxy", ("Proxy", "reward"), format_signed),
    Column(
        "kl", ("KL to SFT,", "nats"), "{:z.2f}".format,
        "How far the policy moved from SFT: the average of log(probability under the policy ÷ probability under SFT) "
        "of a whole response, in nats (1 nat: about 2.7 times as likely). SFT itself has 0. Below it the standard "
        "error.", lambda row, key: f"± {row[f'{key}_stderr']:.2f}",
    ),
    Column(
        "ood_share", ("Un-", "familiar"), PERCENT,
        "Share of responses that lie far from what the reward model was fitted on, where its score is a guess.",
    ),
    Column("length", ("Words",), "{:.1f}".format, "Per response, punctuation not counted."),
    Column(
        "repetition", ("Repeats",), "{:.1%}".format,
        "Share of a response's word pairs that it had already used.",
    ),
    Column(
        "distinct_2", ("Distinct", "pairs"), PERCENT,
        "Of all word pairs in all responses, the share that are different. A low value means that the policy says the "
        "same everywhere.",
    ),
    Column(
        "truncated_share", ("No end",), PERCENT,
        "Share of responses that were cut at the length limit because the policy had not finished.",
    ),
)  # fmt: skip
"""Columns from left to right."""

WIN_RATE_COLUMNS = (
    Column("win_rate", ("All", "pairs"), PERCENT),
    Column(
        "win_rate_length_controlled", ("At equal", "length"), PERCENT,
        "What a logistic regression of the outcome on the difference in length expects where there is none (Dubois et "
        "al. 2024, arXiv 2404.04475).",
    ),
    Column(
        "win_rate_finished", ("Both", "finished"), PERCENT,
        "Of the pairs in which neither response was cut at the length limit.", _pairs_subtext,
    ),
    Column(
        "win_rate_same_length", ("Within", "one word"), PERCENT,
        "Of the pairs whose lengths differ by at most one word.", _pairs_subtext,
    ),
    Column(
        "win_rate_bound", ("At most,", "by KL"), PERCENT,
        "No policy that is as near to SFT can win more, by any judge: a win rate above it is noise.",
    ),
)  # fmt: skip
"""Columns of the table of controls: the gold judge's win rate."""

CORRECT_COLUMN = Column("reward_gold", ("Right", "answers"), PERCENT, "Share of right answers: the gold judge's mean.")
"""Column of `reward_gold` if the gold judge is the right answer."""

RULE_COLUMN = Column(
    "reward_gold", ("Gold", "rule"), format_signed, "The mean of the rule that judges in place of people."
)
"""Column of `reward_gold` if `evaluate.gold_rule` is set."""


def columns_of(table: Table, *, has_gold_judge: bool, has_gold_rule: bool = False) -> list[Column]:
    """Columns whose key is in the table.

    Args:
        has_gold_judge: whether the gold judge is a model of people's ratings; else it is whether the answer is right.
        has_gold_rule: whether, without that model, a rule judges in place of right answers.
    """
    known = {key for row in table.values() for key in row}
    gold_column = RULE_COLUMN if has_gold_rule else CORRECT_COLUMN
    shown = [column if has_gold_judge or column.key != gold_column.key else gold_column for column in COLUMNS]
    if "success" in known:
        known.discard(gold_column.key)  # the same number
    return [column for column in shown if column.key in known]


def cells(table: Table, columns: Sequence[Column]) -> dict[str, list[Cell]]:
    """Cells of each policy; a dash for a missing number and for the win rates of the reference against itself."""
    return {policy: [_cell(policy, row, column) for column in columns] for policy, row in table.items()}


def _cell(policy: str, row: Row, column: Column) -> Cell:
    against_itself = policy == REFERENCE and column.key.startswith("win_rate")
    if against_itself or column.key not in row:
        return "–", ""
    return column.format_value(row[column.key]), column.subtext(row, column.key)
