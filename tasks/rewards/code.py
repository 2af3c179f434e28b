"""Reward for programs: 1 where the tests of the row pass, run by `tasks.rewards.sandbox`.

A row's `answer` holds its tests: Python that calls the function under test by its name or as `candidate`, and either
asserts at once or defines `check(candidate)`, as HumanEval does (Chen et al. 2021, arXiv 2107.03374). Values that pass
between tests and function are plain data. The function is the one that a line `# entry_point: NAME` of the tests names,
else the last that the prompt begins with `def`. What follows a line `# held out` is a second set of tests, complete in
itself and never rewarded: `evaluate.gold_rule` with `held_out: true` judges by it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tasks.core.errors import DataError
from tasks.rewards.sandbox.sandbox import Job, Sandbox
from tasks.rewards.sandbox.verdict import SandboxResult, Status

if TYPE_CHECKING:
    from tasks.config.rules import CodeRule

__all__ = ["CodeReward", "code_reward", "extract_program", "function_under_test", "select_tests"]

# A block of any language opens: else the end of one in another language would be read as the program's beginning.
_FENCE_RE = re.compile(r"^[ ]{0,3}```[ ]*([^\s`]*)[^\n`]*\n(.*?)^[ ]{0,3}```[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_LANGUAGES = ("", "python", "py", "python3")
_ENTRY_POINT_RE = re.compile(r"^#\s*entry_point:\s*(\w+)\s*$", re.MULTILINE)
_HELD_OUT_RE = re.compile(r"^#\s*held out\s*$", re.MULTILINE)
_DEF_RE = re.compile(r"^(?:async\s+)?def\s+(\w+)\s*\(", re.MULTILINE)

_NO_PROGRAM = SandboxResult(Status.REFUSED, "the response holds no program")


def code_reward(options: CodeRule, answers: Mapping[str, str]) -> CodeReward:
    """Build the component `code`; tests the sandbox once, before training.

    Raises:
        ConfigError: the sandbox cannot be built, or does not hold, on this machine.
    """
    return CodeReward(Sandbox(options), options, answers)


class CodeReward:
    """1 if the response's program passes all tests of its prompt, else 0; the way to fail is a metric only.

    There is no share of tests passed: a program that returns a constant would earn it.

    Gamed by: answering the tests' cases one by one (those that the prompt shows, or that are easy to guess) instead of
    computing; by slow programs that stay just within the limits; by tests that hold vacuously, such as a loop over what
    the function returned. The verdict itself is out of the program's reach. Against that: tests with many values that
    the prompt does not show, `held_out` tests at evaluation, a second component for length (a table of cases is long),
    and the KL penalty. Watch `failures/<status>`: where `refused` or `timeout` rises, the policy probes the sandbox.
    """

    def __init__(self, sandbox: Sandbox, options: CodeRule, answers: Mapping[str, str]) -> None:
        """`answers` maps a prompt to its tests."""
        self._sandbox, self._options, self._answers = sandbox, options, answers

    def __call__(self, prompts: list[str], responses: list[str]) -> Tensor:
        """Values of `score_with_metrics` alone."""
        return self.score_with_metrics(prompts, responses)[0]

    def score_with_metrics(self, prompts: list[str], responses: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """1 or 0 for each response [B], and an indicator of each way to fail [B].

        Raises:
            DataError: a prompt has no tests, or tests that cannot judge any program.
        """
        verdicts = self.verdicts(prompts, responses)
        failures = {
            f"failures/{status}": torch.tensor([float(verdict.status is status) for verdict in verdicts])
            for status in Status
            if status is not Status.PASSED
        }
        return torch.tensor([float(verdict.status is Status.PASSED) for verdict in verdicts]), failures

    def verdicts(self, prompts: list[str], responses: list[str]) -> list[SandboxResult]:
        """Results of all responses [B], with reasons."""
        pairs = zip(prompts, responses, strict=True)
        jobs = [self._job(prompt, response) for prompt, response in pairs]
        found = iter(self._sandbox.run([job for job in jobs if job is not None]))
        return [_NO_PROGRAM if job is None else next(found) for job in jobs]

    def _job(self, prompt: str, response: str) -> Job | None:
        if prompt not in self._answers:
            raise DataError(
                f"the rule 'code': no tests are known for the prompt {prompt[:200]!r}; give its rows an `answer`, or "
                "remove the component's weight"
            )
        name = function_under_test(prompt, self._answers[prompt])
        tests = select_tests(self._options, self._answers[prompt])
        program = extract_program(self._options, prompt, response, name)
        preamble = _prompt_preamble(prompt) if self._options.program == "completion" else ""
        return Job(program, tests, name, preamble) if program is not None else None


def function_under_test(prompt: str, tests: str) -> str:
    """Name that the tests give, else that of the prompt's last function: helpers come before it.

    Raises:
        DataError: neither gives one.
    """
    found = _ENTRY_POINT_RE.findall(tests) or _DEF_RE.findall(prompt)
    if not found:
        raise DataError(
            f"the rule 'code': which function is under test? The prompt {prompt[:200]!r} begins none with `def`; "
            "add a line `# entry_point: NAME` to the row's tests"
        )
    return str(found[-1])


def select_tests(options: CodeRule, answer: str) -> str:
    """Select the tests of a row's `answer`: those before its line `# held out`, or those after it."""
    training_tests, *held_out = _HELD_OUT_RE.split(answer, maxsplit=1)
    return held_out[0] if options.held_out and held_out else training_tests


def extract_program(options: CodeRule, prompt: str, response: str, name: str) -> str | None:
    """Extract the program of a response; None where there is none.

    A completion is taken as it is: a policy that goes on after its function has to learn to stop.
    """
    if options.program == "whole":
        return response if response.strip() else None
    if options.program == "completion":
        return prompt + response if response.strip() else None
    blocks = [block for language, block in _FENCE_RE.findall(response) if language.lower() in _LANGUAGES]
    defining = [block for block in blocks if name in _DEF_RE.findall(block)]
    return (defining or blocks)[-1] if blocks else None


def _prompt_preamble(prompt: str) -> str:
    """Prompt as trusted code for the helpers that tests use: the program may have changed them.

    Empty where it does not compile: then the tests need none of it, or fail.
    """
    text = f"{prompt}\n    pass\n"
    try:
        compile(text, "prompt.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return ""
    return text
