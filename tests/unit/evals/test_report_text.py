import pytest

from tasks.evals.compare import Table
from tasks.evals.report_text import best_policy, summarise_table


def _row(
    gold: tuple[float, float, float],
    proxy: tuple[float, float, float],
    n: int = 256,
    length: float = 10.0,
    gain: float = 0.9,
) -> dict[str, float]:
    names = ("", "_low", "_high")
    rates = {f"win_rate{name}": value for name, value in zip(names, gold, strict=True)}
    return (
        {"n": n, "length": length, "gain_gold": gain, "gain_proxy": 1.0}
        | rates
        | {f"win_rate_proxy{name}": value for name, value in zip(names, proxy, strict=True)}
    )


EVEN, UP, DOWN, UNCLEAR = (0.5, 0.5, 0.5), (0.8, 0.75, 0.85), (0.3, 0.25, 0.36), (0.53, 0.47, 0.59)


def test_each_policy_stands_where_its_interval_lies() -> None:
    table: Table = {"sft": _row(EVEN, EVEN), "ppo": _row(UP, UP), "grpo": _row(UP, UP), "dpo": _row(UNCLEAR, UNCLEAR)}
    verdict = summarise_table(table)
    assert verdict.gold == (
        "By the gold judge, PPO (preferred on 80% of prompts, 95% interval 75–85%) and GRPO (80%, interval 75–85%) "
        "beat SFT; DPO (53%, interval 47–59%) is not clearly better or worse than SFT."
    )
    assert "and the gold judge agree on which policies beat SFT" in verdict.agreement
    assert verdict.suspects == ()
    assert verdict.caution == ""


@pytest.mark.parametrize("gold", [DOWN, UNCLEAR])
def test_proxy_up_and_gold_not_is_suspected_hacking(gold: tuple[float, float, float]) -> None:
    verdict = summarise_table({"sft": _row(EVEN, EVEN), "ppo": _row(gold, UP)})
    assert verdict.suspects == ("ppo",)
    assert verdict.agreement.startswith("Proxy and gold disagree:")
    assert "PPO is clearly better" in verdict.agreement


def test_a_gain_that_gold_confirms_by_less_than_half_is_suspected_too() -> None:
    verdict = summarise_table({"sft": _row(EVEN, EVEN), "ppo": _row(UP, UP, gain=0.4), "grpo": _row(UP, UP, gain=0.6)})
    assert verdict.suspects == ("ppo",)
    assert "PPO is clearly better" in verdict.agreement


def test_a_winner_with_signs_of_hacking_is_not_to_be_trusted() -> None:
    table: Table = {"sft": _row(EVEN, EVEN), "ppo": _row(UP, UP), "grpo": _row((0.7, 0.6, 0.78), UP)}
    trusted = "PPO comes first: preferred to SFT on 80% of prompts. GRPO may be as good: the intervals overlap."
    assert summarise_table(table, ["grpo"]).winner == trusted
    assert summarise_table(table, ["ppo"]).winner == (
        "PPO is not to be trusted: preferred to SFT on 80% of prompts, but with signs of reward hacking. Read its "
        "samples first."
    )


def test_gold_up_and_proxy_not_is_reported_without_suspicion() -> None:
    verdict = summarise_table({"sft": _row(EVEN, EVEN), "dpo": _row(UP, UNCLEAR)})
    assert verdict.suspects == ()
    assert verdict.agreement.startswith("DPO is clearly better by the gold judge, but not by the proxy")


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
