from typing import Any

import pytest
from jinja2 import UndefinedError

from tasks.evals.compare import Table
from tasks.evals.report_text import (
    COLUMNS,
    best_policy,
    cells,
    columns_of,
    format_signed,
    load_template,
    summarise_table,
    turning_point,
)


def _row(
    gold: tuple[float, float, float],
    proxy: tuple[float, float, float],
    n: int = 256,
    length: float = 10.0,
    gain: float = 0.9,
) -> dict[str, float]:
    rates = {
        f"{prefix}{end}": value
        for prefix, interval in (("win_rate", gold), ("win_rate_proxy", proxy))
        for end, value in zip(("", "_low", "_high"), interval, strict=True)
    }
    return rates | {"n": n, "length": length, "gain_gold": gain, "gain_proxy": 1.0}


EVEN, UP, DOWN, UNCLEAR = (0.5, 0.5, 0.5), (0.8, 0.75, 0.85), (0.3, 0.25, 0.36), (0.53, 0.47, 0.59)


def test_each_policy_stands_where_its_interval_lies() -> None:
    table: Table = {"sft": _row(EVEN, EVEN), "ppo": _row(UP, UP), "grpo": _row(UP, UP), "dpo": _row(UNCLEAR, UNCLEAR)}
    summary = summarise_table(table)
    assert summary.gold == (
        "By the gold judge, PPO (preferred on 80% of prompts, 95% interval 75–85%) and GRPO (80%, interval 75–85%) "
        "beat SFT; DPO (53%, interval 47–59%) is not clearly better or worse than SFT."
    )
    assert "and the gold judge agree on which policies beat SFT" in summary.agreement
    assert summary.suspects == ()
    assert summary.caution == ""


@pytest.mark.parametrize("gold", [DOWN, UNCLEAR])
def test_proxy_up_and_gold_not_is_suspected_hacking(gold: tuple[float, float, float]) -> None:
    summary = summarise_table({"sft": _row(EVEN, EVEN), "ppo": _row(gold, UP)})
    assert summary.suspects == ("ppo",)
    assert summary.agreement.startswith("Proxy and gold disagree:")
    assert "PPO is clearly better" in summary.agreement


def test_a_gain_that_gold_confirms_by_less_than_half_is_suspected_too() -> None:
    summary = summarise_table({"sft": _row(EVEN, EVEN), "ppo": _row(UP, UP, gain=0.4), "grpo": _row(UP, UP, gain=0.6)})
    assert summary.suspects == ("ppo",)
    assert "PPO is clearly better" in summary.agreement


def test_a_winner_with_signs_of_hacking_is_not_to_be_trusted() -> None:
    table: Table = {"sft": _row(EVEN, EVEN), "ppo": _row(UP, UP), "grpo": _row((0.7, 0.6, 0.78), UP)}
    trusted = "PPO comes first: preferred to SFT on 80% of prompts. GRPO may be as good: the intervals overlap."
    assert summarise_table(table, ["grpo"]).winner == trusted
    assert summarise_table(table, ["ppo"]).winner == (
        "PPO is not to be trusted: preferred to SFT on 80% of prompts, but with signs of reward hacking. Read its "
        "samples first."
    )


def test_gold_up_and_proxy_not_is_reported_without_suspicion() -> None:
    summary = summarise_table({"sft": _row(EVEN, EVEN), "dpo": _row(UP, UNCLEAR)})
    assert summary.suspects == ()
    assert summary.agreement.startswith("DPO is clearly better by the gold judge, but not by the proxy")


def test_an_interval_that_touches_one_half_decides_nothing() -> None:
    touching = (0.6, 0.5, 0.7)
    assert (
        "PPO (preferred on 60% of prompts, 95% interval 50–70%) is not clearly"
        in summarise_table({"sft": _row(EVEN, EVEN), "ppo": _row(touching, touching)}).gold
    )


def test_a_length_that_moved_by_more_than_a_fifth_is_pointed_out() -> None:
    table = {"sft": _row(EVEN, EVEN), "ppo": _row(UP, UP, length=7.9), "grpo": _row(UP, UP, length=8.1)}
    assert summarise_table(table).drift == (
        "Responses changed in length, which may be part of the gain: PPO's are 21% shorter than SFT's."
    )
    table |= {"grpo": _row(UP, UP, length=13.0)}
    assert "PPO's are 21% shorter and GRPO's are 30% longer than SFT's." in summarise_table(table).drift
    assert summarise_table({"sft": _row(EVEN, EVEN), "ppo": _row(UP, UP)}).drift == ""
    assert summarise_table({"sft": _row(EVEN, EVEN, length=0.0), "ppo": _row(UP, UP)}).drift == ""


def test_few_prompts_are_pointed_out_and_a_lone_reference_is_no_error() -> None:
    assert "Only 8 prompts" in summarise_table({"sft": _row(EVEN, EVEN, n=8)}).caution
    assert summarise_table({"sft": _row(EVEN, EVEN)}).gold == "There is no policy to compare with SFT."


def test_the_winner_has_the_highest_lower_end_and_who_overlaps_it_may_be_as_good() -> None:
    """PPO's mean is higher, GRPO's lower end; PPO's and an unclear DPO's upper ends reach it, or do not."""
    table: Table = {
        "sft": _row(EVEN, EVEN), "ppo": _row((0.82, 0.70, 0.9), UP), "grpo": _row(UP, UP), "dpo": _row(UNCLEAR, UP),
    }  # fmt: skip
    assert best_policy(table) == "grpo"
    assert summarise_table(table).winner == (
        "GRPO comes first: preferred to SFT on 80% of prompts. PPO may be as good: the intervals overlap."
    )
    assert summarise_table({"sft": _row(EVEN, EVEN), "ppo": _row(UP, UP), "dpo": _row(UNCLEAR, UP)}).winner == (
        "PPO is best: preferred to SFT on 80% of prompts."
    )


@pytest.mark.parametrize("gold", [DOWN, UNCLEAR, (0.6, 0.5, 0.7)])
def test_nobody_wins_whose_interval_does_not_lie_above_one_half(gold: tuple[float, float, float]) -> None:
    assert summarise_table({"sft": _row(EVEN, EVEN), "ppo": _row(gold, UP)}).winner == "No policy clearly beats SFT."
    assert best_policy({"sft": _row(EVEN, EVEN)}) is None


def test_a_judge_that_follows_the_order_of_responses_is_pointed_out() -> None:
    row = _row(UP, UP)
    table: Table = {"sft": _row(EVEN, EVEN), "ppo": row | {"judge_inconsistent": 0.51}, "dpo": row}
    assert summarise_table(table).caution.startswith("Do not rely on the LLM judge for PPO: on more than half")
    table["ppo"] = row | {"judge_inconsistent": 0.5}
    assert summarise_table(table).caution == ""


ROW = {"win_rate": 0.793, "win_rate_low": 0.733, "win_rate_high": 0.844, "kl": 3.335, "kl_stderr": 0.165}
TABLE: Table = {
    "sft": {
        "win_rate": 0.5, "win_rate_low": 0.5, "win_rate_high": 0.5, "kl": 0.0, "kl_stderr": 0.0, "reward_gold": -0.2,
    },
    "ppo": ROW
    | {"reward_gold": 0.6, "accuracy_strict": 0.42, "accuracy_strict_low": 0.4, "accuracy_strict_high": 0.45},
}  # fmt: skip


def test_a_column_is_shown_where_the_table_has_its_key_and_a_missing_number_is_a_dash() -> None:
    columns = columns_of(TABLE, has_gold_judge=True)
    assert [column.key for column in columns] == ["win_rate", "accuracy_strict", "reward_gold", "kl"]
    assert cells(TABLE, columns) == {
        "sft": [("–", ""), ("–", ""), ("−0.20", ""), ("0.00", "± 0.00")],
        "ppo": [("79%", "73–84"), ("42%", "40–45"), ("+0.60", ""), ("3.33", "± 0.17")],
    }


def test_the_gold_judge_is_a_share_where_it_is_the_right_answer() -> None:
    column = next(column for column in columns_of(TABLE, has_gold_judge=False) if column.key == "reward_gold")
    assert column.heading == ("Right", "answers")
    assert column.format_value(0.6) == "60%"


def test_every_column_is_explained_by_itself_or_by_its_kind_or_judge() -> None:
    unexplained = [column.key for column in COLUMNS if not column.meaning]
    assert unexplained == ["win_rate_judge", "win_rate_vader", "win_rate_proxy", "vader", "reward_proxy"]


def test_numbers_have_a_true_minus_and_no_sign_at_nothing() -> None:
    assert [format_signed(value) for value in (1.234, -0.5, 0.001, -0.001)] == ["+1.23", "−0.50", "0.00", "0.00"]


POINTS = [{"method": method, "distance": distance} for method in ("ppo", "best_of_n") for distance in ("1.0", "2.0")]


def _fit(form: str, alpha: float, beta: tuple[float, float, float], peak: float | None, share: float) -> dict[str, Any]:
    mean, low, high = beta
    return {"gold": {"form": form, "alpha": {"mean": alpha}, "beta": {"mean": mean, "low": low, "high": high},
                     "peak": peak, "peak_fraction": share}}  # fmt: skip


def test_a_peak_within_what_was_measured_is_over_optimisation() -> None:
    """α/2β = 1.5 of 2.0."""
    text = turning_point({"best_of_n": _fit("best_of_n", 1.2, (0.4, 0.3, 0.5), 1.5, 0.934)}, POINTS)
    assert text == (
        "Over-optimised: by the gold judge, best of n is best at √KL 1.5 and gets worse from there to 2.0, the "
        "farthest measured (β 0.40, 95% interval 0.30 to 0.50; 93% of resamples peak within it)."
    )


def test_a_peak_whose_beta_may_be_nothing_is_only_perhaps_one() -> None:
    text = turning_point({"ppo": _fit("rl", 1.2, (0.7, -0.1, 1.5), 1.9, 0.6)}, POINTS)
    assert text.startswith("Perhaps over-optimised: by the gold judge, PPO is best at √KL 1.9")
    assert "95% interval −0.10 to 1.50, which holds 0; 60% of resamples" in text


def test_curves_that_still_rise_are_listed_with_their_largest_distance() -> None:
    """A peak beyond 2.0 was not measured; −log d with β < 0 never has one."""
    rising = {
        "ppo": _fit("rl", 0.4, (-0.2, -0.5, 0.1), None, 0.0),
        "best_of_n": _fit("best_of_n", 1.2, (0.1, 0.0, 0.2), 6.0, 0.012),
    }
    text = turning_point(rising, POINTS)
    assert "still better at the farthest √KL of PPO (2.0) and best of n (2.0); at most 2% of the resamples" in text
    assert "none of the resamples" in turning_point({"ppo": rising["ppo"]}, POINTS)


def test_a_curve_that_ends_below_sft_is_no_gain() -> None:
    """2·(−0.5 + 0.1·log 2) is below 0, and β < 0 has no peak."""
    text = turning_point({"ppo": _fit("rl", -0.5, (-0.1, -0.2, 0.0), None, 0.0)}, POINTS)
    assert text == "By the gold judge's fitted curve, PPO ended no better than SFT."


def test_without_curves_there_is_nothing_to_say() -> None:
    assert turning_point({}, []) == ""


@pytest.mark.parametrize("name", ["report.html.j2", "card.md.j2"])
def test_a_name_that_nothing_defines_is_an_error(name: str) -> None:
    filters = dict.fromkeys(("escape_control_chars", "format_signed", "cell", "name"), str)
    with pytest.raises(UndefinedError):
        load_template(name, filters, autoescape=True).render()
