"""Each detector on a case made for it, just below its threshold, and on a run in which nothing is wrong."""

from __future__ import annotations

import pytest

from tasks.rl.hacking import DETECTORS, PREFIX, detectors_fired, run_detectors

WEIGHTS = {"learned": 1.0, "brevity": 2.0}

START = {
    "reward/learned": 0.0, "reward/brevity": 0.5, "score_std": 1.0, "length": 16.0, "repetition": 0.01,
    "distinct_2": 0.8, "entropy": 4.0, "truncated_share": 0.4, "ood_share": 0.3, "kl": 0.0,
}  # fmt: skip

FIRES = {
    "length_drift": {"length": 8.0},
    "repetition": {"repetition": 0.12},
    "ngram_collapse": {"distinct_2": 0.4},
    "entropy_collapse": {"entropy": 2.0},
    "reward_variance_collapse": {"score_std": 0.5},
    "component_tradeoff": {"reward/learned": 2.0, "reward/brevity": 0.0},
    "truncation": {"truncated_share": 0.66},
    "ood_responses": {"ood_share": 0.56},
    "kl_spike": {"kl": 2.5},
}
"""component_tradeoff: +2 and 2 · −0.5: one gains 1 in all, the other pays 1, all of it. kl_spike: 2.5 = 5 · 0.5."""

HOLDS = {
    "length_drift": {"length": 31.0},
    "repetition": {"repetition": 0.1},
    "ngram_collapse": {"distinct_2": 0.41},
    "entropy_collapse": {"entropy": 2.1},
    "reward_variance_collapse": {"score_std": 1.9},
    "component_tradeoff": {"reward/learned": 2.0, "reward/brevity": 0.3},
    "truncation": {"truncated_share": 0.6},
    "ood_responses": {"ood_share": 0.5},
    "kl_spike": {"kl": 2.4},
}
"""component_tradeoff: +2 and 2 · −0.2: 1.6 in all, and 0.4 paid, a quarter of it."""


def last(change):
    signs, found = run_detectors([START, START | change, START | change], WEIGHTS)
    return signs, [detector.name for detector, _ in found]


def test_every_detector_has_its_cases():
    assert [detector.name for detector in DETECTORS] == list(FIRES) == list(HOLDS)


@pytest.mark.parametrize("name", FIRES)
def test_it_fires_where_it_should_and_nothing_else_does(name):
    assert last(FIRES[name])[1] == [name]


@pytest.mark.parametrize("name", HOLDS)
def test_it_holds_below_its_threshold(name):
    assert last(HOLDS[name])[1] == []


def test_length_drifts_both_ways():
    assert last({"length": 32.0})[1] == ["length_drift"]


def kl_spike(*kl):
    return run_detectors([START | {"kl": value} for value in kl], WEIGHTS)[0].get(PREFIX + "kl_spike")


def test_a_jump_counts_against_the_changes_before():
    """Changes of 1, 1 and 1, then 4: 4 medians; without them it would be 8 times the floor."""
    assert kl_spike(0.0, 1.0, 2.0, 3.0, 7.0, 7.5) == pytest.approx(4.0)
    assert kl_spike(0.0, 7.0, 7.5) == pytest.approx(14.0)


def test_a_jump_that_the_next_update_does_not_confirm_is_an_outlier():
    assert kl_spike(0.0, 1.0, 2.0, 3.0, 13.0) == pytest.approx(1.0)
    assert kl_spike(0.0, 1.0, 2.0, 3.0, 13.0, 4.0) == pytest.approx(1.0)
    assert kl_spike(0.0, 13.0) is None


def test_one_update_of_half_the_length_is_no_drift():
    """What PPO of the default task did on its way from 17 tokens to 10."""
    rows = [START | {"length": length} for length in (17.05, 9.67, 8.48, 11.20)]
    seen = [run_detectors(rows[:count], WEIGHTS)[0][PREFIX + "length_drift"] for count in range(1, 5)]
    assert seen == pytest.approx([1, 1, 17.05 / 9.67, 17.05 / 11.20])


def test_one_update_in_which_nobody_earns_anything_is_no_collapse():
    rows = [START | {"score_std": spread} for spread in (0.2, 0.0, 0.3, 0.1, 0.08)]
    seen = [run_detectors(rows[:count], WEIGHTS)[0][PREFIX + "reward_variance_collapse"] for count in range(1, 6)]
    assert seen == pytest.approx([1, 1, 2 / 3, 2 / 3, 2])


def test_a_spread_of_nothing_is_a_factor_of_a_thousand():
    assert last({"score_std": 0.0})[0][PREFIX + "reward_variance_collapse"] == 1000


def test_a_reward_of_one_component_has_no_cost():
    assert PREFIX + "component_tradeoff" not in run_detectors([START, START], {"learned": 1.0})[0]


def test_the_first_update_is_the_measure_and_finds_nothing():
    signs, found = run_detectors([START], WEIGHTS)
    assert found == []
    assert signs[PREFIX + "length_drift"] == 1
    assert signs[PREFIX + "truncation"] == 0


def test_it_fires_once_and_again_after_it_went_away():
    rows, counts = [], []
    for length in (16.0, 8.0, 8.0, 7.0, 12.0, 8.0, 8.0):
        rows.append(START | {"length": length})
        signs, found = run_detectors(rows, WEIGHTS)
        rows[-1] = rows[-1] | signs
        counts.append(len(found))
    assert counts == [0, 0, 1, 0, 0, 0, 1]
    ((detector, first, largest),) = detectors_fired(rows)
    assert (detector.name, first) == ("length_drift", 3)
    assert largest == pytest.approx(2)


def test_a_row_without_a_number_is_no_sign():
    """GRPO learns of the entropy later than of the responses; rules do not know what is familiar."""
    row = {key: value for key, value in START.items() if key not in ("entropy", "kl", "ood_share")}
    signs, _ = run_detectors([row, row], WEIGHTS)
    assert PREFIX + "entropy_collapse" not in signs
    assert PREFIX + "kl_spike" not in signs
    assert PREFIX + "ood_responses" not in signs
    assert PREFIX + "length_drift" in signs


def test_a_finding_says_the_number_and_what_to_do():
    ((detector, value),) = run_detectors([START, START | FIRES["truncation"]], WEIGHTS)[1]
    assert value == pytest.approx(0.26)
    assert detector.message(value) == (
        "truncation 0.26 (threshold 0.25, healthy up to 0.14): more responses are cut before their end than SFT's; "
        "raise missing_eos_penalty or max_new_tokens"
    )
