from collections.abc import Callable

import pytest

from tasks.core.errors import DataError
from tasks.evals.compare import (
    HEADLINE,
    ScoredResponse,
    add_null,
    compare_controls,
    compare_policies,
    examples_to_dict,
    first_draws,
    headline,
    select_examples,
)
from tasks.evals.controls import win_rate_bound

Make = Callable[..., ScoredResponse]


def _two_policies(judged: Make) -> list[ScoredResponse]:
    """Gold: PPO wins twice, ties once, loses once, in another order of prompts than the reference's."""
    return [
        judged("sft", "a", gold=1.0, proxy=0.0, response=" a good film", tokens=4),
        judged("sft", "b", gold=2.0, proxy=0.0),
        judged("sft", "c", gold=3.0, proxy=0.0),
        judged("sft", "d", gold=4.0, proxy=0.0),
        judged("ppo", "d", gold=5.0, kl=4.0, kl_k3=1.0, proxy=1.0, response=" good good good", tokens=20, ended=False),
        judged("ppo", "c", gold=3.0, kl=2.0, kl_k3=2.0, proxy=1.0),
        judged("ppo", "b", gold=1.0, kl=1.0, kl_k3=3.0, proxy=1.0, rewards={"learned": 4.0, "repetition": -1.0}),
        judged("ppo", "a", gold=9.0, kl=1.0, kl_k3=4.0, proxy=-1.0, vader=0.5),
    ]


def test_numbers_by_hand(judged: Make) -> None:
    row = compare_policies(_two_policies(judged), samples=500, seed=0)["ppo"]
    exact = {
        "n": 4, "reward_gold": 4.5, "reward_proxy": 0.5, "reward_repetition": -0.25, "vader": 0.125,
        "win_rate": 0.625, "win_rate_ties": 0.25,  # a wins, b loses, c ties, d wins
        "win_rate_vader": 0.625, "win_rate_vader_ties": 0.75,  # one win, three ties
        "win_rate_proxy": 0.75, "win_rate_proxy_ties": 0.0,
        "kl": 2.0, "kl_k3": 2.5, "length": 2.25, "length_tokens": 7.25, "truncated_share": 0.25,
        "repetition": 0.125,  # one of the two pairs of "good good good", the other three responses have none
    }  # fmt: skip
    assert {key: row[key] for key in exact} == exact
    assert row["win_rate_low"] < 0.625 < row["win_rate_high"]
    assert row["kl_stderr"] == pytest.approx((6 / 3 / 4) ** 0.5, abs=1e-6)  # deviations 2, 0, −1, −1
    assert row["distinct_1"] == pytest.approx(3 / 9, abs=1e-6)  # good, some, words of nine


def _draws(judged: Make, policy: str, prompt: str, golds: list[float], **values: object) -> list[ScoredResponse]:
    return [judged(policy, prompt, draw=draw, gold=gold, **values) for draw, gold in enumerate(golds)]


def test_every_pair_of_draws_of_a_prompt_counts_and_every_prompt_the_same(judged: Make) -> None:
    """Prompt a: 3 beats 1 and 2, 1 ties and loses: 2.5 of 4. Prompt b: 0 loses to 1 and ties with 0, twice: 1 of 4.

    SFT's scores 1, 2, 1, 0 have a standard deviation of √(2/3); the gains are (2 − 1.5) and (0 − ½).
    """
    records = [*_draws(judged, "sft", "a", [1.0, 2.0]), *_draws(judged, "sft", "b", [1.0, 0.0])]
    records += [*_draws(judged, "mine", "a", [3.0, 1.0], kl=1.0), *_draws(judged, "mine", "b", [0.0, 0.0], kl=3.0)]
    table = compare_policies(records[::-1], samples=200, seed=0)
    row = table["mine"]
    assert (row["n"], row["win_rate"], row["win_rate_ties"]) == (2, 3.5 / 8, 3 / 8)
    assert (row["win_rate_low"], row["win_rate_high"]) == (0.25, 0.625), "resamples of the prompts, not of the pairs"
    assert (row["gain_gold"], row["kl"], row["kl_stderr"]) == (0.0, 2.0, 1.0)
    assert row["gain_gold_stderr"] == pytest.approx(0.5 / (2 / 3) ** 0.5, abs=1e-6)
    assert (table["sft"]["win_rate"], table["sft"]["gain_gold"]) == (0.5, 0.0)
    assert [record.draw for record in first_draws(records)] == [0, 0, 0, 0]
    assert row["distinct_2"] == 0.5, "two draws of two equal texts each: more draws do not make it smaller"


def test_win_rates_of_pairs_that_finished_or_are_as_long(judged: Make) -> None:
    """SFT: 2 words, ended. Draw 0 of prompt a: 5 words, ended, a win; draw 1: 2 words, not ended, a loss. b: a win."""
    sft = [judged("sft", prompt, gold=1.0) for prompt in "ab"]
    long, cut = {"response": " a b c d e", "gold": 2.0}, {"gold": 0.0, "ended": False}
    own = [judged("ppo", "a", **long), judged("ppo", "a", draw=1, **cut), judged("ppo", "b", **long)]
    own.append(judged("ppo", "b", draw=1, gold=2.0, response=" three short words"))
    row = compare_policies([*sft, *own], samples=50, seed=0)["ppo"]
    assert row["win_rate"] == 0.75
    assert (row["win_rate_finished"], row["win_rate_finished_pairs"]) == (1.0, 3)
    assert (row["win_rate_same_length"], row["win_rate_same_length_pairs"]) == (0.5, 2)
    assert row["win_rate_length_controlled_pairs"] == 4
    all_cut = [record.model_copy(update={"ended": False}) for record in own]
    assert "win_rate_finished" not in compare_policies([*sft, *all_cut], samples=9, seed=0)["ppo"]


def test_the_bound_is_at_the_upper_end_of_the_kl(judged: Make) -> None:
    records = _two_policies(judged)
    row = compare_policies(records, samples=10, seed=0)["ppo"]
    assert row["win_rate_bound"] == pytest.approx(win_rate_bound(2.0 + 1.96 * row["kl_stderr"]), abs=1e-6)
    assert "win_rate_bound" not in compare_policies(records, samples=10, seed=0)["sft"]


def test_controls_are_compared_on_the_prompts_that_they_have_and_a_person_has_no_kl(judged: Make) -> None:
    records = _two_policies(judged)
    null = [judged("null", prompt, gold=gold) for prompt, gold in zip("abcd", (2.0, 1.0, 3.0, 4.0), strict=True)]
    human = [judged("human", "d", gold=9.0, kl=None, kl_k3=None)]
    controls = compare_controls(records[:4], [*null, *human], samples=50, seed=0)
    assert (controls["null"]["n"], controls["null"]["win_rate"]) == (4, 0.5)
    assert (controls["human"]["n"], controls["human"]["win_rate"]) == (1, 1.0)
    assert not {"kl", "kl_stderr", "win_rate_bound"} & set(controls["human"])
    table = add_null(compare_policies(records, samples=50, seed=0), controls)
    assert table["ppo"]["win_rate_null_low"] == controls["null"]["win_rate_low"] < 0.5
    assert "win_rate_null" not in table["sft"]


def test_pass_at_k_is_unbiased_over_the_draws(judged: Make) -> None:
    """Of four draws one is right: one of two drawn is with probability 1 − C(3,2)/C(4,2) = ½; of prompt b none."""
    right, wrong = ({"strict": False, "flexible": flag} for flag in (True, False))
    records = [
        judged("sft", prompt, draw=draw, correct=right if (prompt, draw) == ("a", 2) else wrong)
        for prompt in "ab" for draw in range(4)
    ]  # fmt: skip
    row = compare_policies(records, samples=50, seed=0)["sft"]
    assert (row["accuracy_flexible"], row["pass_at_2"], row["pass_at_4"]) == (0.125, 0.25, 0.5)
    assert (row["pass_at_2_low"], row["pass_at_2_high"]) == (0.0, 0.5)
    assert "pass_at_8" not in row


def test_metrics_are_means_under_their_names(judged: Make) -> None:
    shares = (("sft", "a", 0.0), ("sft", "b", 0.0), ("ppo", "a", 1.0), ("ppo", "b", 0.0))
    records = [judged(*names, metrics={"ood_share": share, "disagreement": 2 * share}) for *names, share in shares]
    table = compare_policies(records, samples=10, seed=0)
    assert (table["ppo"]["ood_share"], table["ppo"]["disagreement"]) == (0.5, 1.0)
    assert table["sft"]["ood_share"] == 0.0
    assert "ood_share" not in compare_policies(_two_policies(judged), samples=10, seed=0)["sft"]


def test_gain_is_the_paired_difference_in_spreads_of_the_reference(judged: Make) -> None:
    row = compare_policies(_two_policies(judged), samples=10, seed=0)["ppo"]
    spread = (5 / 3) ** 0.5  # of 1, 2, 3, 4
    assert row["gain_gold"] == pytest.approx((8 - 1 + 0 + 1) / 4 / spread, abs=1e-6)
    assert row["gain_gold_stderr"] == pytest.approx((50 / 3 / 4) ** 0.5 / spread, abs=1e-6)  # 8, −1, 0, 1 around 2
    assert row["gain_proxy"] == 0.5  # the reference's proxy does not vary: in points


def test_the_reference_is_even_with_itself(judged: Make) -> None:
    row = compare_policies(_two_policies(judged), samples=50, seed=0)["sft"]
    for prefix in ("win_rate", "win_rate_vader", "win_rate_proxy"):
        assert (row[prefix], row[f"{prefix}_low"], row[f"{prefix}_high"]) == (0.5, 0.5, 0.5)
        assert row[f"{prefix}_ties"] == 1.0
    assert (row["kl"], row["gain_gold"]) == (0.0, 0.0)


def test_headline_holds_the_seven_promised_keys_for_every_policy(judged: Make) -> None:
    table = compare_policies(_two_policies(judged), samples=10, seed=0)
    assert list(headline(table)) == ["sft", "ppo"]
    promised = {"reward_proxy", "reward_gold", "win_rate", "win_rate_low", "win_rate_high", "kl", "length"}
    assert promised <= set(HEADLINE)
    of_others = {"win_rate_judge", "judge_first", "judge_inconsistent"}
    without_answers = {"accuracy_strict", "accuracy_flexible", "accuracy_greedy", "pass_at_2"}
    without_environment = {"success", "success_low", "success_high", "turns"}
    assert set(HEADLINE) - set(table["ppo"]) == of_others | without_answers | without_environment


def test_success_has_an_interval_and_turns_a_mean(judged: Make) -> None:
    measures = [{"success": float(place < 3), "turns": float(place + 1)} for place in range(4)]
    records = [judged("sft", str(place), metrics=value) for place, value in enumerate(measures)]
    row = headline(compare_policies(records, samples=500, seed=0))["sft"]
    assert (row["success"], row["turns"]) == (0.75, 2.5)
    assert 0.0 < row["success_low"] < 0.75 < row["success_high"] == 1.0


def test_accuracy_is_the_share_of_right_answers_among_the_prompts_that_have_one(judged: Make) -> None:
    right, wrong = {"strict": False, "flexible": True}, {"strict": False, "flexible": False}
    correct = [{"strict": True, "flexible": True}, right, right, wrong, None]
    records = [judged("sft", str(place), correct=value) for place, value in enumerate(correct)]
    table = compare_policies(records, samples=500, seed=0)
    row = table["sft"]
    assert (row["accuracy_strict"], row["accuracy_flexible"]) == (0.25, 0.75)
    assert row["accuracy_strict_low"] == 0.0 < 0.25 < row["accuracy_strict_high"] < 1.0
    assert 0.0 < row["accuracy_flexible_low"] < 0.75 < row["accuracy_flexible_high"] == 1.0
    assert headline(table)["sft"]["accuracy_flexible"] == 0.75


def test_every_policy_answers_every_prompt_once(judged: Make) -> None:
    records = _two_policies(judged)
    with pytest.raises(DataError, match=r"ppo has 3 responses to 3 prompts; .* each of the 4 prompts of sft"):
        compare_policies(records[:-1], samples=10, seed=0)
    with pytest.raises(DataError, match="ppo has 4 responses to 3 prompts"):
        compare_policies([*records[:-1], records[-2]], samples=10, seed=0)
    with pytest.raises(DataError, match="sft has 2 responses to 1 prompts"):
        compare_policies([records[0], records[0]], samples=10, seed=0)
    with pytest.raises(DataError, match=r"no responses of 'sft'.*\['ppo'\]"):
        compare_policies(records[4:], samples=10, seed=0)


@pytest.fixture
def records(judged: Make) -> list[ScoredResponse]:
    """Gains by gold: a +6, b −1, c +1. By the proxy: a +1, b +3, c +1."""
    return [
        judged("sft", "a", gold=0.0, proxy=0.0),
        judged("sft", "b", gold=2.0, proxy=1.0),
        judged("sft", "c", gold=4.0, proxy=2.0),
        judged("ppo", "c", gold=5.0, proxy=3.0),
        judged("ppo", "b", gold=1.0, proxy=4.0, response=" hacked", ended=False, kl=2.5),
        judged("ppo", "a", gold=6.0, proxy=1.0),
    ]


def test_gains_and_losses_are_in_golds_points_and_disagreements_in_deviations(records: list[ScoredResponse]) -> None:
    own = select_examples(records, 2)["ppo"]
    assert [(example.own.prompt_id, example.score_difference) for example in own["gains"]] == [("a", 6.0), ("c", 1.0)]
    assert [(example.own.prompt_id, example.score_difference) for example in own["losses"]] == [("b", -1.0)]
    # a: 1/1 − 6/2 = −2; b: 3/1 − (−1)/2 = 3.5; c: 1/1 − 1/2 = 0.5
    assert [example.own.prompt_id for example in own["disagreements"]] == ["b", "c"]
    assert [example.score_difference for example in own["disagreements"]] == pytest.approx([3.5, 0.5])
    assert [(example.reference.policy, example.reference.prompt_id) for example in own["gains"]] == [
        ("sft", "a"), ("sft", "c"),
    ]  # fmt: skip
    fewer = select_examples(records, 1)
    assert list(fewer) == ["ppo"], "the reference has none"
    assert [[example.own.prompt_id for example in group] for group in fewer["ppo"].values()] == [["a"], ["b"], ["b"]]


def test_equal_gains_stand_in_the_order_of_prompts_whatever_the_order_of_records(judged: Make) -> None:
    records = [judged("sft", name) for name in "abcd"] + [judged("ppo", name, gold=1.0) for name in "dbca"]
    for given in (records, records[::-1]):
        assert [example.own.prompt_id for example in select_examples(given, 3)["ppo"]["gains"]] == ["a", "b", "c"]


def test_a_difference_in_the_last_digits_is_none_and_a_lone_reference_no_error(judged: Make) -> None:
    own = select_examples([judged("sft", "a"), judged("ppo", "a", gold=1e-6, proxy=1e-6)], 3)["ppo"]
    assert own == {"gains": [], "losses": [], "disagreements": []}
    assert select_examples([judged("sft", "a")], 1) == {}


def test_json_has_both_responses_with_the_scores_of_those_who_judged(
    judged: Make, records: list[ScoredResponse]
) -> None:
    loss = examples_to_dict(select_examples(records, 1)["ppo"])["losses"][0]
    assert (loss["prompt_id"], loss["prompt"], loss["score_difference"]) == ("b", "prompt b", -1.0)
    assert loss["ppo"] == {"response": " hacked", "ended": False, "kl": 2.5, "gold": 1.0, "vader": 0.0, "proxy": 4.0}
    assert loss["sft"]["gold"] == 2.0
    silent = [judged("sft", "a", vader=None), judged("ppo", "a", gold=1.0, vader=None)]
    assert "vader" not in examples_to_dict(select_examples(silent, 1)["ppo"])["gains"][0]["ppo"]
