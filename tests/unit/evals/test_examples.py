"""Selected examples, by hand: SFT's gold scores 0, 2, 4 and proxy scores 0, 1, 2 have deviations 2 and 1."""

from collections.abc import Callable

import pytest

from tasks.evals.compare import ScoredResponse
from tasks.evals.report import examples_to_dict, select_examples

Make = Callable[..., ScoredResponse]


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
    assert [(example.own.prompt_id, example.score_difference) for example in own.gains] == [("a", 6.0), ("c", 1.0)]
    assert [(example.own.prompt_id, example.score_difference) for example in own.losses] == [("b", -1.0)]
    # a: 1/1 − 6/2 = −2; b: 3/1 − (−1)/2 = 3.5; c: 1/1 − 1/2 = 0.5
    assert [example.own.prompt_id for example in own.disagreements] == ["b", "c"]
    assert [example.score_difference for example in own.disagreements] == pytest.approx([3.5, 0.5])
    assert all(example.reference.policy == "sft" for example in own.gains)
    assert all(example.reference.prompt_id == example.own.prompt_id for example in own.gains)


def test_no_more_than_asked_for_and_the_largest_first(records: list[ScoredResponse]) -> None:
    own = select_examples(records, 1)["ppo"]
    assert [len(group) for group in (own.gains, own.losses, own.disagreements)] == [1, 1, 1]
    assert own.gains[0].own.prompt_id == "a"


def test_equal_gains_stand_in_the_order_of_prompts_whatever_the_order_of_records(judged: Make) -> None:
    records = [judged("sft", name) for name in "abcd"] + [judged("ppo", name, gold=1.0) for name in "dbca"]
    for given in (records, records[::-1]):
        assert [example.own.prompt_id for example in select_examples(given, 3)["ppo"].gains] == ["a", "b", "c"]


def test_a_difference_in_the_last_digits_is_none(judged: Make) -> None:
    own = select_examples([judged("sft", "a"), judged("ppo", "a", gold=1e-6, proxy=1e-6)], 3)["ppo"]
    assert own.gains == own.losses == own.disagreements == ()


def test_the_reference_has_none_and_a_lone_reference_is_no_error(judged: Make, records: list[ScoredResponse]) -> None:
    assert list(select_examples(records, 1)) == ["ppo"]
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
