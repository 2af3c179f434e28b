"""Answers that are equal as mathematics, and expressions that are too large to compare."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tasks.config.rules import MathRule
from tasks.core.errors import DataError
from tasks.rewards.rules import math_worker
from tasks.rewards.rules.base import FaultTolerantRule
from tasks.rewards.rules.math import MathWorker, math_rule

pytest.importorskip("math_verify")


@pytest.fixture(scope="module")
def equal() -> Iterator[MathWorker]:
    process = MathWorker(20.0)
    yield process
    process.close()


@pytest.mark.parametrize(
    ("expected", "response", "value"),
    [
        ("1/2", "It is 0.5.", True), (r"\frac{1}{2}", r"So \boxed{\frac{2}{4}}", True),
        ("x^2+2x+1", "$(x+1)^2$", True), ("$\\{1, 2\\}$", "$\\{2, 1\\}$", True),
        ("42", "It is 41", False), ("42", "", False), ("42", r"\boxed{41} \boxed{42}", False), ("42", "none", False),
    ],
)  # fmt: skip
def test_answers_are_compared_in_value(equal: MathWorker, expected: str, response: str, value: bool) -> None:
    assert equal(expected, response) is value


def test_it_works_in_another_thread_and_the_comparison_has_no_clock_of_its_own(equal: MathWorker) -> None:
    """math-verify's own would turn what is late into a plain 0, uncounted; it works in no thread but the main one."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(equal, "4", "$2+2$").result() is True
        assert pool.submit(math_worker.answers_equal, "4", "$2+2$").result() is True


@pytest.mark.parametrize("response", ["", r"$\frac{$", "$x^$", r"\boxed{}", r"\boxed{\frac{1}{}}", "$1/0$", "$$", "?"])
def test_a_response_that_is_no_mathematics_is_wrong_and_no_failure(equal: MathWorker, response: str) -> None:
    assert equal("5", response) is False


def test_a_right_answer_that_is_no_mathematics_is_a_failure_of_the_sample(equal: MathWorker) -> None:
    with pytest.raises(RuntimeError, match=r"ValueError: the right answer '\$' is no mathematics"):
        equal("$", "5")
    assert equal("5", "5") is True


@pytest.mark.parametrize("answer", ["Paris", " yes ", "no solution", "sin x", "abc"])
def test_words_as_right_answers_are_refused_at_the_start(answer: str) -> None:
    """They would be read as products of letters, in which Paris equals Pairs."""
    problem = rf"`answer` {answer!r} of the prompt 'Where\?' is words.*`answer` or `contains_facts`"
    with pytest.raises(DataError, match=problem):
        math_rule(MathRule(function="math"), {"Six?": "6", "Where?": answer})


@pytest.mark.parametrize(
    "answer", ["6", "xy", "ab", "x", "$abc$", r"\infty", r"\text{Paris}", "sin(x)", "sqrt(2)", "x + abc", "2 m", ""]
)
def test_mathematics_as_right_answers_is_taken(answer: str) -> None:
    math_rule(MathRule(function="math"), {"Where?": answer})


def test_what_cannot_be_compared_is_a_failure_and_the_next_sample_is_not() -> None:
    process = MathWorker(2.0)
    rule = FaultTolerantRule("math", lambda prompt, response: float(process(prompt, response)), 0.0)
    try:
        huge = "$9^{9^{9^{9^{9}}}} - 9^{9^{9^{9}}}$ is $\\frac{10}{2}$"
        values, metrics = rule.score_with_metrics(["5", "5"], [huge, "5"])
        assert (values[1], metrics["failures/math"][1]) == (1.0, 0.0)
        process._timeout_s = 0.1
        os.kill(process._ensure_running().pid, signal.SIGSTOP)
        assert rule.score_with_metrics(["5"], ["5"])[1]["failures/math"].tolist() == [1.0]
        process._timeout_s = 20.0
        assert rule.score_with_metrics(["5"], ["5"])[0].tolist() == [1.0], "another process answers"
    finally:
        process.close()
