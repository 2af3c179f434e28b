"""Reward for mathematical answers that are equal in value, however they are written."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from typing import TYPE_CHECKING

from tasks.core.errors import DataError
from tasks.rewards.rules import math_worker
from tasks.rewards.rules.answers import require_answer
from tasks.rewards.rules.base import Answers, PerSampleRule, import_extra

if TYPE_CHECKING:
    from tasks.config.rules import MathRule

__all__ = ["MathWorker", "math_rule"]

START_TIMEOUT_S = 60.0  # importing sympy takes one second where the disk is not slow
MIN_WORD_LETTERS = 3  # `xy` is more likely a product


class MathWorker:
    """Worker process that compares answers one by one, and is killed when late.

    math-verify bounds its time by SIGALRM, which works in a main thread only, takes away others' alarms, and cannot
    interrupt one long operation on integers (9^9^9^9).
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, expected: str, response: str) -> bool:
        """Compare the response's answer with the expected one.

        Raises:
            TimeoutError: it took too long.
            RuntimeError: it could not be compared.
        """
        process = self._ensure_running()
        assert process.stdin
        process.stdin.write(json.dumps([expected, response]) + "\n")
        process.stdin.flush()
        reply = json.loads(self._read_reply(process, self._timeout_s))
        if isinstance(reply, str):
            raise RuntimeError(reply)
        return bool(reply)

    def close(self) -> None:
        """End the process; the next comparison starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _ensure_running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            command = [sys.executable, "-P", math_worker.__file__]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, encoding="utf-8")
            self._read_reply(self._process, START_TIMEOUT_S)
        return self._process

    def _read_reply(self, process: subprocess.Popen[str], timeout_s: float) -> str:
        """Read the next line, if it comes in time; there is one per request, so the pipe's buffer is empty."""
        assert process.stdout
        ready, _, _ = select.select([process.stdout], [], [], timeout_s)
        line = process.stdout.readline() if ready else ""
        if not line:
            self.close()
            reason = "the comparing process ended" if ready else f"no answer within {timeout_s:g} s"
            raise TimeoutError(f"{reason}: the expression is too large to compare")
        return line


def math_rule(options: MathRule, answers: Answers) -> PerSampleRule:
    """1 if the last answer of the response equals the row's `answer` as mathematics (math-verify), else 0.

    Both may be LaTeX or plain: `\\frac{1}{2}` in the row is 0.5 and \\boxed{1/2} in the response.

    Gamed by: as `exact_match`, a right result after wrong reasoning; a set of several boxed answers is another value
    than one of them, so naming many does not pay. A response that repeats the task's own expression, unsolved, equals
    the answer as mathematics ("2+2" is 4). Against that: the KL penalty, a `format` gate that asks for a number.

    An answer of one or two letters is a product of variables (`xy` is `yx`), so `no` as a word equals `on`.

    Raises:
        DataError: an answer is words, which would be read as products of letters.
    """
    import_extra("math_verify", "math")
    for prompt, answer in answers.items():
        parts = answer.split()
        if all(map(str.isalpha, parts)) and any(len(part) >= MIN_WORD_LETTERS for part in parts):
            raise DataError(
                f"reward.weights.math: the `answer` {answer!r} of the prompt {prompt[:200]!r} is words, which would be "
                "read as a product of letters; use the rule `answer` or `contains_facts` for words, or write "
                "mathematics as LaTeX: $abc$ for a product, \\sin x for a function"
            )
    worker = MathWorker(options.timeout_s)
    return PerSampleRule(lambda prompt, response: float(worker(require_answer("math", prompt, answers), response)))
