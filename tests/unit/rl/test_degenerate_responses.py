"""What must not go unnoticed."""

from __future__ import annotations

import pytest
import torch

from tasks.core.errors import TrainingError
from tasks.rl.hacking import DegenerateResponseMonitor, check_finite, response_metrics

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
    ],
)
def test_degeneration(responses, ended, expected, findings):
    metrics, found = response_metrics(responses, ended)
    assert (metrics["empty_share"], metrics["distinct_share"], metrics["truncated_share"]) == pytest.approx(expected)
    assert metrics["degenerate_count"] == len(findings)
    assert len(found) == len(findings)
    for text, start in zip(found, findings, strict=True):
        assert text.startswith(start)


def test_one_response_is_not_called_the_same():
    assert response_metrics(["x"], torch.tensor([True]))[1] == []


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
