from typing import Any

import pytest
from jinja2 import UndefinedError

from tasks.evals.compare import Table
from tasks.evals.report_columns import COLUMNS, WIN_RATE_COLUMNS, cells, columns_of, format_signed
from tasks.evals.report_text import Summary, best_policy, load_template, summarise_table, turning_point

Interval = tuple[float, float, float]
EVEN, UP, DOWN, UNCLEAR = (0.5, 0.5, 0.5), (0.8, 0.75, 0.85), (0.3, 0.25, 0.36), (0.53, 0.47, 0.59)
TOUCHING = (0.6, 0.5, 0.7)


def _row(gold: Interval, proxy: Interval = UP, **values: float) -> dict[str, float]:
    rates = {
        f"{prefix}{end}": value
        for prefix, interval in (("win_rate", gold), ("win_rate_proxy", proxy))
        for end, value in zip(("", "_low", "_high"), interval, strict=True)
    }
    return rates | {"n": 256, "length": 10.0, "gain_gold": 0.9, "gain_proxy": 1.0} | values


SFT = _row(EVEN, EVEN)


def _summary(**rows: dict[str, float]) -> Summary:
    return summarise_table({"sft": SFT} | rows)


def test_each_policy_stands_where_its_interval_lies() -> None:
    summary = _summary(ppo=_row(UP), grpo=_row(UP), dpo=_row(UNCLEAR, UNCLEAR))
    assert summary.gold == (
        "By the gold judge, PPO (preferred in 80% of pairs, 95% interval 75–85%) and GRPO (80%, interval 75–85%) "
        "beat SFT; DPO (53%, interval 47–59%) is not clearly better or worse than SFT."
    )
    assert "and the gold judge agree on which policies beat SFT" in summary.agreement
    assert (summary.suspects, summary.caution, summary.drift) == ((), "", "")
    assert "PPO (preferred in 60% of pairs, 95% interval 50–70%) is not clearly" in _summary(ppo=_row(TOUCHING)).gold
    assert _summary().gold == "There is no policy to compare with SFT."


@pytest.mark.parametrize("ppo", [_row(DOWN), _row(UNCLEAR), _row(UP, gain_gold=0.4)])
def test_a_gain_by_the_proxy_that_gold_confirms_by_less_than_half_is_suspected_hacking(ppo: dict[str, float]) -> None:
    summary = _summary(ppo=ppo, grpo=_row(UP, gain_gold=0.6))
    assert summary.suspects == ("ppo",)
    assert summary.agreement.startswith("Proxy and gold disagree:")
    assert "PPO is clearly better" in summary.agreement


def test_a_winner_with_signs_of_hacking_is_not_to_be_trusted() -> None:
    table: Table = {"sft": SFT, "ppo": _row(UP), "grpo": _row((0.7, 0.6, 0.78))}
    trusted = "PPO comes first: preferred to SFT in 80% of pairs. GRPO may be as good: the intervals overlap."
    assert summarise_table(table, ["grpo"]).winner == trusted
    assert summarise_table(table, ["ppo"]).winner == (
        "PPO is not to be trusted: preferred to SFT in 80% of pairs, but with signs of reward hacking. Read its "
        "samples first."
    )


def test_gold_up_and_proxy_not_is_reported_without_suspicion() -> None:
    summary = _summary(dpo=_row(UP, UNCLEAR))
    assert summary.suspects == ()
    assert summary.agreement.startswith("DPO is clearly better by the gold judge, but not by the proxy")


def test_a_length_that_moved_by_more_than_a_fifth_is_pointed_out() -> None:
    ppo = _row(UP, length=7.9)
    assert _summary(ppo=ppo, grpo=_row(UP, length=8.1)).drift == (
        "Responses changed in length: PPO's are 21% shorter than SFT's."
    )
    grpo = _row(UP, length=13.0, win_rate_length_controlled=0.61)
    assert _summary(ppo=ppo, grpo=grpo).drift == (
        "Responses changed in length: PPO's are 21% shorter than SFT's and GRPO's are 30% longer than SFT's (its win "
        "rate is 80%, at equal length 61%)."
    )
    assert _summary(sft=SFT | {"length": 0.0}, ppo=_row(UP)).drift == ""


def test_the_winner_has_the_highest_lower_end_and_who_overlaps_it_may_be_as_good() -> None:
    """PPO's mean is higher, GRPO's lower end; PPO's and an unclear DPO's upper ends reach it, or do not."""
    table: Table = {"sft": SFT, "ppo": _row((0.82, 0.70, 0.9)), "grpo": _row(UP), "dpo": _row(UNCLEAR)}
    assert best_policy(table) == "grpo"
    assert summarise_table(table).winner == (
        "GRPO comes first: preferred to SFT in 80% of pairs. PPO may be as good: the intervals overlap."
    )
    best = _summary(ppo=_row(UP), dpo=_row(UNCLEAR)).winner
    assert best == "PPO is best: preferred to SFT in 80% of pairs."


@pytest.mark.parametrize("gold", [DOWN, UNCLEAR, TOUCHING])
def test_nobody_wins_whose_interval_does_not_lie_above_one_half(gold: Interval) -> None:
    assert _summary(ppo=_row(gold)).winner == "No policy clearly beats SFT."
    assert best_policy({"sft": SFT}) is None


def test_few_prompts_and_a_judge_that_follows_the_order_of_responses_are_pointed_out() -> None:
    assert "Only 8 prompts" in _summary(sft=SFT | {"n": 8}).caution
    caution = _summary(ppo=_row(UP, judge_inconsistent=0.51), dpo=_row(UP)).caution
    assert caution.startswith("Do not rely on the LLM judge for PPO: on more than half")
    assert _summary(ppo=_row(UP, judge_inconsistent=0.5)).caution == ""


DOUBTS = {
    "PPO's win rate is no evidence: a win rate of 80% is impossible at a KL of 0.10 nats": {"win_rate_bound": 0.63},
    "PPO's win rate is no evidence: SFT against itself is as far from 50%: 18.0% against 80.0%": {
        "win_rate_null": 0.18
    },
}


@pytest.mark.parametrize("text", DOUBTS)
def test_nobody_beats_sft_by_a_win_rate_that_is_no_evidence(text: str) -> None:
    """GRPO, with a lower win rate and no doubt, is the best then."""
    ppo = _row(UP, kl=0.1, **DOUBTS[text])
    summary = _summary(ppo=ppo)
    assert summary.caution.startswith(text)
    assert (summary.winner, summary.agreement) == ("No policy clearly beats SFT.", "")
    assert "is not clearly better or worse than SFT" in summary.gold
    grpo = _row((0.7, 0.6, 0.8), kl=3.0, win_rate_bound=0.98)
    both: Table = {"sft": SFT, "ppo": ppo, "grpo": grpo}
    assert best_policy(both) == "grpo"
    assert summarise_table(both).winner.startswith("GRPO comes first: preferred to SFT in 70% of pairs")


TABLE: Table = {
    "sft": {
        "win_rate": 0.5, "win_rate_low": 0.5, "win_rate_high": 0.5, "kl": 0.0, "kl_stderr": 0.0, "reward_gold": -0.2,
    },
    "ppo": {
        "win_rate": 0.793, "win_rate_low": 0.733, "win_rate_high": 0.844, "kl": 3.335, "kl_stderr": 0.165,
        "reward_gold": 0.6, "accuracy_strict": 0.42, "accuracy_strict_low": 0.4, "accuracy_strict_high": 0.45,
    },
}  # fmt: skip


def test_a_column_is_shown_where_the_table_has_its_key_and_a_missing_number_is_a_dash() -> None:
    columns = columns_of(TABLE, has_gold_judge=True)
    assert [column.key for column in columns] == ["win_rate", "accuracy_strict", "reward_gold", "kl"]
    assert cells(TABLE, columns) == {
        "sft": [("–", ""), ("–", ""), ("−0.20", ""), ("0.00", "± 0.00")],
        "ppo": [("79%", "73–84"), ("42%", "40–45"), ("+0.60", ""), ("3.33", "± 0.17")],
    }


def test_the_gold_judge_is_a_share_where_it_is_the_right_answer() -> None:
    (column,) = (column for column in columns_of(TABLE, has_gold_judge=False) if column.key == "reward_gold")
    assert (column.heading, column.format_value(0.6)) == (("Right", "answers"), "60%")


def test_every_column_is_explained_by_itself_or_by_its_kind_or_judge() -> None:
    unexplained = [column.key for column in (*COLUMNS, *WIN_RATE_COLUMNS[1:]) if not column.meaning]
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
    """2·(−0.5 + 0.1·log 2) is below 0, and β < 0 has no peak; without curves there is nothing to say."""
    text = turning_point({"ppo": _fit("rl", -0.5, (-0.1, -0.2, 0.0), None, 0.0)}, POINTS)
    assert text == "By the gold judge's fitted curve, PPO ended no better than SFT."
    assert turning_point({}, []) == ""


@pytest.mark.parametrize("name", ["report.html.j2", "card.md.j2"])
def test_a_name_that_nothing_defines_is_an_error(name: str) -> None:
    filters = dict.fromkeys(("escape_control_chars", "format_signed", "cell", "json", "name"), str)
    with pytest.raises(UndefinedError):
        load_template(name, filters, autoescape=True).render()
