"""What must not go unnoticed: degenerate responses, numbers that are not finite, and each detector on its own case."""

import pytest
import torch

from tasks.core.errors import TrainingError
from tasks.rl.hacking import (
    DETECTORS,
    PREFIX,
    DegenerateResponseMonitor,
    check_finite,
    detectors_fired,
    response_metrics,
    run_detectors,
)

YES, NO = torch.tensor([True, True, True]), torch.tensor([False, False, False])


@pytest.mark.parametrize(
    ("responses", "ended", "expected", "findings"),
    [
        (["a", "b", "b"], torch.tensor([True, False, False]), (0, 2 / 3, 2 / 3), []),
        (["", " ", "\n"], YES, (1, 1, 0), ["all responses are empty"]),
        (["x", "x", "x"], YES, (0, 1 / 3, 0), ["all 3 responses are the same: 'x'"]),
        (["a", "b", "c"], NO, (0, 1, 1), ["no response has an end token"]),
        (["x", "x", "x"], NO, (0, 1 / 3, 1), ["all 3 responses are the same: 'x'", "no response has an end token"]),
        (["", "", "a"], YES, (2 / 3, 2 / 3, 0), []),
        (["x"], YES[:1], (0, 1, 0), []),
    ],
)
def test_degeneration(responses, ended, expected, findings):
    metrics, found = response_metrics(responses, ended)
    assert (metrics["empty_share"], metrics["distinct_share"], metrics["truncated_share"]) == pytest.approx(expected)
    assert metrics["degenerate_count"] == len(findings)
    assert len(found) == len(findings)
    for text, start in zip(found, findings, strict=True):
        assert text.startswith(start)


def test_repetition_and_distinct_pairs_by_hand():
    """a-b, b-a, a-b, b-a: two of four pairs were there before; with c-d three of five are different."""
    metrics, _ = response_metrics(["a b a b a", "c d"], torch.tensor([True, True]))
    assert metrics["repetition"] == pytest.approx((2 / 4 + 0) / 2)
    assert metrics["distinct_2"] == pytest.approx(3 / 5)


def test_the_monitor_warns_when_a_finding_begins_and_when_it_begins_again():
    messages = []
    watch = DegenerateResponseMonitor(messages.append)
    for update, responses in enumerate([["a", "b"], ["c", "c"], ["c", "c"], ["a", "b"], ["c", "c"]], start=1):
        watch(responses, torch.tensor([True, True]), update)
    assert messages == [f"warning: update {update}: all 2 responses are the same: 'c'" for update in (2, 5)]


def test_check_finite_names_quantity_and_samples():
    values = torch.zeros(6, 2)
    values[1, 0], values[2, 1], values[3, 0], values[5, 1] = float("nan"), float("inf"), float("-inf"), float("nan")
    prompts, responses = [f"p{i}" for i in range(6)], ["r" * 300, *(f"r{i}" for i in range(1, 6))]
    expected = (
        "score not finite for 4 of 6 responses: prompt 'p1', response 'r1'; prompt 'p2', response 'r2'; "
        "prompt 'p3', response 'r3'; and 1 more"
    )
    with pytest.raises(TrainingError) as caught:
        check_finite("score", values, prompts, responses)
    assert str(caught.value) == expected
    check_finite("score", torch.zeros(6), prompts, responses)
    with pytest.raises(TrainingError, match=r"prompt 'p3', response 'r3'$"):
        check_finite("score", values[:5], prompts[:5], responses[:5])


# -- detectors: each just below its threshold too, and on a run in which nothing is wrong ------------------------------

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


@pytest.mark.parametrize(("name", "change"), [*FIRES.items(), ("length_drift", {"length": 32.0})])
def test_it_fires_where_it_should_and_nothing_else_does(name, change):
    assert last(change)[1] == [name]


@pytest.mark.parametrize("change", HOLDS.values(), ids=HOLDS)
def test_it_holds_below_its_threshold(change):
    assert last(change)[1] == []


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


@pytest.mark.parametrize(
    ("detector", "metric", "values", "expected"),
    [  # what PPO of the default task did on its way from 17 tokens to 10; an update in which nobody earns anything
        ("length_drift", "length", (17.05, 9.67, 8.48, 11.20), [1, 1, 17.05 / 9.67, 17.05 / 11.20]),
        ("reward_variance_collapse", "score_std", (0.2, 0.0, 0.3, 0.1, 0.08), [1, 1, 2 / 3, 2 / 3, 2]),
    ],
)
def test_one_noisy_update_is_no_finding(detector, metric, values, expected):
    rows = [START | {metric: value} for value in values]
    seen = [run_detectors(rows[: count + 1], WEIGHTS)[0][PREFIX + detector] for count in range(len(rows))]
    assert seen == pytest.approx(expected)


def test_a_loss_beside_a_gain_of_nothing_is_noise_unless_it_stays():
    """The whole gains 0.02 and one component has lost 0.1, five times as much; in the next update all is well."""
    noise, well = {"reward/learned": -0.1, "reward/brevity": 0.56}, {"reward/learned": 0.3, "reward/brevity": 0.6}
    assert run_detectors([START, START | noise], WEIGHTS)[1] == []
    assert run_detectors([START, START | noise, START | well], WEIGHTS)[0][PREFIX + "component_tradeoff"] == 0
    (found,) = run_detectors([START, START | noise, START | noise], WEIGHTS)[1]
    assert (found[0].name, found[1]) == ("component_tradeoff", pytest.approx(5.0))


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
    assert (detector.name, first, largest) == ("length_drift", 3, pytest.approx(2))


def test_a_row_without_a_number_is_no_sign():
    """GRPO learns of the entropy later than of the responses; rules do not know what is familiar."""
    row = {key: value for key, value in START.items() if key not in ("entropy", "kl", "ood_share")}
    signs, _ = run_detectors([row, row], WEIGHTS)
    absent = {PREFIX + name for name in ("entropy_collapse", "kl_spike", "ood_responses")}
    assert set(signs) == {PREFIX + detector.name for detector in DETECTORS} - absent


def test_a_finding_says_the_number_and_what_to_do():
    ((detector, value),) = run_detectors([START, START | FIRES["truncation"]], WEIGHTS)[1]
    assert value == pytest.approx(0.26)
    assert detector.message(value) == (
        "truncation 0.26 (threshold 0.25, healthy up to 0.14): more responses are cut before their end than SFT's; "
        "raise missing_eos_penalty or max_new_tokens"
    )
