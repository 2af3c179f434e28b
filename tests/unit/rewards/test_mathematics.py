"""Answers that are equal as mathematics, and expressions that are too large to compare."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tasks.rewards.counting import Counted
from tasks.rewards.rules.mathematics import Comparing

pytest.importorskip("math_verify")


@pytest.fixture(scope="module")
def equal() -> Iterator[Comparing]:
    comparing = Comparing(20.0)
    yield comparing
    comparing.close()


@pytest.mark.parametrize(
    ("expected", "response", "value"),
    [
        ("1/2", "It is 0.5.", True), (r"\frac{1}{2}", r"So \boxed{\frac{2}{4}}", True),
        ("x^2+2x+1", "$(x+1)^2$", True),
        ("42", "It is 41", False), ("42", "", False), ("42", r"\boxed{41} \boxed{42}", False),
        ("42", "no number", False),
        ("$\\{1, 2\\}$", "$\\{2, 1\\}$", True),
    ],
)  # fmt: skip
def test_answers_are_compared_in_value(equal: Comparing, expected: str, response: str, value: bool) -> None:
    assert equal(expected, response) is value


def test_it_works_in_another_thread_and_leaves_alarms_alone(equal: Comparing) -> None:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(equal("4", "$2+2$")))
    thread.start()
    thread.join()
    assert found == [True]


def test_what_cannot_be_compared_is_a_failure_and_the_next_sample_is_not() -> None:
    comparing = Comparing(2.0)
    rule = Counted("mathematics", lambda prompt, response: float(comparing(prompt, response)), 0.0)
    try:
        values, measures = rule.measured(["5", "5"], ["$9^{9^{9^{9^{9}}}} - 9^{9^{9^{9}}}$ is $\\frac{10}{2}$", "5"])
        assert values.tolist()[1] == 1.0
        assert measures["failures/mathematics"].tolist()[1] == 0.0
        comparing._timeout_s = 1e-9
        assert rule.measured(["5"], ["5"])[1]["failures/mathematics"].tolist() == [1.0]
        comparing._timeout_s = 20.0
        assert rule.measured(["5"], ["5"])[0].tolist() == [1.0], "another process answers"
    finally:
        comparing.close()
