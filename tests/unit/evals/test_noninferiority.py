"""The champion's rule, metric by metric, on paired cases small enough to count."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest

from tasks.core.sections import gate
from tasks.evals.compare import Judged
from tasks.evals.noninferiority import METRICS, compared, no_worse
from tasks.evals.statistics import Interval

Make = Callable[..., Judged]


def test_every_metric_that_params_may_name_is_one() -> None:
    assert tuple(METRICS) == get_args(gate.Metric)


def four(judged: Make) -> tuple[list[Judged], list[Judged]]:
    """Gold: a wins by 2, b ties, c and d lose by 1."""
    ours = [
        judged("ppo", "a", gold=3.0, vader=0.5, kl=4.0, response=" good good good", ended=False),
        judged("ppo", "b", gold=1.0, vader=0.5, kl=2.0, ended=False),
        judged("ppo", "c", gold=0.0, vader=0.5, kl=2.0),
        judged("ppo", "d", gold=0.0, vader=-0.5, kl=2.0),
    ]
    theirs = [judged("old", name, gold=1.0, vader=0.0, kl=1.5, ended=name != "d") for name in "abcd"]
    return ours, theirs


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("win_rate", (1 + 0.5 + 0 + 0) / 4),
        ("win_rate_vader", (1 + 1 + 1 + 0) / 4),
        ("reward_gold", (2 + 0 - 1 - 1) / 4),
        ("repetition", 0.5 / 4),  # one of the two word pairs of "good good good" is a repetition
        ("no_end_share", (1 + 1 + 0 - 1) / 4),
        ("kl", (2.5 + 0.5 + 0.5 + 0.5) / 4),
    ],
)
def test_means_by_hand(judged: Make, metric: str, expected: float) -> None:
    ours, theirs = four(judged)
    found = compared(metric, ours, theirs, samples=200, seed=0)
    assert found.mean == pytest.approx(expected)
    assert found.low < expected < found.high
    swapped = compared(metric, theirs, ours, samples=200, seed=0)
    assert swapped.mean == pytest.approx(2 * METRICS[metric].even - expected), "better for one is worse for the other"


def test_answers_are_paired(judged: Make) -> None:
    """Two policies whose repetition differs from prompt to prompt, but never from each other: no doubt about zero."""
    texts = [" good good good", " a b", " so so so so", " c"]
    ours, theirs = ([judged(name, str(n), response=text) for n, text in enumerate(texts)] for name in ("ppo", "old"))
    assert compared("repetition", ours, theirs, samples=100, seed=0) == Interval(0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"zip\(\) argument 2"):
        compared("repetition", ours, theirs[:3], samples=100, seed=0)


@pytest.mark.parametrize(
    ("metric", "interval", "margin", "holds"),
    [
        ("win_rate", (0.55, 0.45, 0.65), 0.05, True),
        ("win_rate", (0.55, 0.4499, 0.65), 0.05, False),
        ("reward_gold", (0.1, -0.2, 0.4), 0.2, True),
        ("reward_gold", (0.1, -0.2001, 0.4), 0.2, False),
        ("repetition", (0.0, -0.3, 0.05), 0.05, True),
        ("repetition", (0.0, -0.3, 0.0501), 0.05, False),
        ("no_end_share", (-0.1, -0.2, 0.0), 0.0, True),
        ("no_end_share", (0.1, 0.0001, 0.2), 0.0, False),
        ("kl", (-1.0, -9.0, 0.5), 0.5, True),
        ("kl", (-1.0, -9.0, 0.51), 0.5, False),
    ],
)
def test_the_bad_end_of_the_interval_decides(
    metric: str, interval: tuple[float, float, float], margin: float, holds: bool
) -> None:
    assert no_worse(metric, Interval(*interval), margin).passed is holds


def test_a_rule_says_which_end_and_which_bound() -> None:
    finding = no_worse("kl", Interval(0.4, 0.1, 0.75), 0.5)
    assert (finding.rule, finding.measured, finding.required) == (
        "KL to SFT less the champion's, nats, upper end",
        "+0.750",
        "at most +0.5",
    )
    assert no_worse("reward_gold", Interval(0.0, -0.3, 0.3), 0.1).required == "at least -0.1"
