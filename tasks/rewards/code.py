"""Reward for programs: 1 where the tests of the row pass, or the share that does, run by `tasks.rewards.sandbox`.

A row's `answer` holds its tests: Python that calls the function under test by its name or as `candidate`, and either
asserts at once or defines `check(candidate)`, as HumanEval does (Chen et al. 2021, arXiv 2107.03374). Values that pass
between tests and function are plain data. The function is the one that a line `# entry_point: NAME` of the tests names,
else the last that the prompt begins with `def`. What follows a line `# held out` is a second set of tests, complete in
itself and never rewarded: `evaluate.gold_rule` with `held_out: true` judges by it.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from tasks.core.errors import DataError
from tasks.rewards.sandbox.sandbox import Job, Sandbox, SandboxResult, Status

if TYPE_CHECKING:
    from tasks.config.rules import CodeRule

__all__ = ["CodeReward", "extract_program", "function_under_test", "select_tests", "split_tests"]

_FENCE, _MAX_FENCE_INDENT = "```", 3
_LANGUAGES = ("", "python", "py", "python3")
_ENTRY_POINT_RE = re.compile(r"^#\s*entry_point:\s*(\w+)\s*$", re.MULTILINE)
_HELD_OUT_RE = re.compile(r"^#\s*held out\s*$", re.MULTILINE)
_DEF_RE = re.compile(r"^(?:async\s+)?def\s+(\w+)\s*\(", re.MULTILINE)

_NO_PROGRAM = SandboxResult(Status.REFUSED, "the response holds no program")


class CodeReward:
    """1 if the response's program passes all tests of its prompt, else 0; with `credit: share` the share of them.

    Gamed with `credit: share`: by a constant that some tests expect, or by answering only the easy cases; so judge by
    all tests (`evaluate.gold_rule` with the default credit).

    Gamed by: answering the tests' cases one by one (those that the prompt shows, or that are easy to guess) instead of
    computing; by slow programs that stay just within the limits; by tests that hold vacuously, such as a loop over what
    the function returned, or `assert not abs(x - y) > eps` for NaN. The result itself is out of the program's reach.
    Against that: the tests are tried on trivial answers before training, and those that accept one are named and
    counted in `weak_tests`; tests with many values that the prompt does not show, `held_out` tests at evaluation, a
    second component for length (a table of cases is long), and the KL penalty. Watch `failures/<status>`: where
    `refused` or `timeout` rises, the policy probes the sandbox.
    """

    def __init__(self, options: CodeRule, answers: Mapping[str, str]) -> None:
        """Test the sandbox and all tests once, before training; `answers` maps a prompt to its tests.

        Raises:
            ConfigError: the sandbox cannot be built, or does not hold, on this machine.
            DataError: tests cannot judge any program, or do not say which function they are of.
        """
        self._sandbox, self._options, self._answers = Sandbox(options), options, answers
        jobs = [self._job(prompt, "") for prompt in answers]
        trivial = self._sandbox.trivial_answers(jobs)
        parts = [part for job in jobs for part in self._parts(job) if part != job]
        self._sandbox.trivial_answers(parts)  # raises where one cannot judge a program
        self._weak = {prompt: accepted for prompt, accepted in zip(answers, trivial, strict=True) if accepted}
        if self._weak:
            tqdm.write(self._weak_tests_warning(), file=sys.stderr)

    def _weak_tests_warning(self) -> str:
        names = {prompt: function_under_test(prompt, self._answers[prompt]) for prompt in self._weak}
        lines = [f"  {names[prompt]} ({accepted}): {prompt[:100]!r}" for prompt, accepted in self._weak.items()]
        return "\n".join([
            f"reward: warning: the tests of {len(lines)} of {len(self._answers)} prompts pass where every call gives "
            "None, NaN, [], '' or an exception; they pay for it. Add a test that it fails, such as `assert abs(x - y) "
            "<= eps` in place of `assert not abs(x - y) > eps`. Function, what its tests accept, and prompt:", *lines,
        ])  # fmt: skip

    def score_with_metrics(self, prompts: list[str], responses: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores [B] in [0, 1], the shares [B] of the runs that failed in each way, and an indicator of weak tests."""
        jobs = [self._job(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        parts = [self._parts(job) for job in jobs]
        found = iter(self._run([job for own in parts for job in own]))
        runs = [[next(found).status for _ in own] for own in parts]
        columns = {status: torch.tensor([own.count(status) / len(own) for own in runs]) for status in Status}
        passed = columns.pop(Status.PASSED)
        weak = torch.tensor([float(prompt in self._weak) for prompt in prompts])
        return passed, {f"failures/{status}": values for status, values in columns.items()} | {"weak_tests": weak}

    def results(self, prompts: list[str], responses: list[str]) -> list[SandboxResult]:
        """Results of all responses [B] on all their tests, with reasons."""
        return self._run([self._job(prompt, response) for prompt, response in zip(prompts, responses, strict=True)])

    def _run(self, jobs: Sequence[Job]) -> list[SandboxResult]:
        found = iter(self._sandbox.run([job for job in jobs if job.program is not None]))
        return [_NO_PROGRAM if job.program is None else next(found) for job in jobs]

    def _parts(self, job: Job) -> list[Job]:
        """What earns by itself: all tests, or with `credit: share` each of them."""
        tests = split_tests(job.tests, job.name) if self._options.credit == "share" else [job.tests]
        return [replace(job, tests=part) for part in tests]

    def _job(self, prompt: str, response: str) -> Job:
        if prompt not in self._answers:
            raise DataError(
                f"the rule 'code': no tests are known for the prompt {prompt[:200]!r}; give its rows an `answer`, or "
                "remove the component's weight"
            )
        name = function_under_test(prompt, self._answers[prompt])
        program = extract_program(self._options, prompt, response, name)
        preamble = _prompt_preamble(prompt) if self._options.program == "completion" else ""
        return Job(program, select_tests(self._options, self._answers[prompt]), name, preamble)


def function_under_test(prompt: str, tests: str) -> str:
    """Name that the tests give, else that of the prompt's last function.

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
    """Tests of a row's `answer`: those before its line `# held out`, or those after it."""
    training_tests, *held_out = _HELD_OUT_RE.split(answer, maxsplit=1)
    return held_out[0] if options.held_out and held_out else training_tests


def split_tests(tests: str, name: str) -> list[str]:
    """The tests once for each `assert` statement that names the function, beside all other statements.

    Of tests that define `check` its statements count, else those of the module; those in loops and the like belong to
    the others. With fewer than two there is one part, and of tests that are no Python.
    """
    try:
        tree = ast.parse(tests)
    except (SyntaxError, ValueError):
        return [tests]
    check = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check"]
    names = {name, "candidate", *(argument.arg for node in check for argument in node.args.args)}
    body = check[-1].body if check else tree.body
    statements, parts = list(body), []
    own = [node for node in statements if isinstance(node, ast.Assert) and names & _names(node)]
    for kept in own:
        body[:] = [node for node in statements if node is kept or node not in own]
        parts.append(ast.unparse(tree))
    return parts if len(parts) > 1 else [tests]


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def extract_program(options: CodeRule, prompt: str, response: str, name: str) -> str | None:
    """Extract the program of a response; None where there is none. A completion is taken as it is."""
    if options.program != "fenced":
        program = prompt + response if options.program == "completion" else response
        return program if response.strip() else None
    blocks = [block for language, block in _fenced_blocks(response) if language.lower() in _LANGUAGES]
    defining = [block for block in blocks if name in _DEF_RE.findall(block)]
    return (defining or blocks)[-1] if blocks else None


def _fenced_blocks(text: str) -> Iterator[tuple[str, str]]:
    """Language and content of each fenced block that ends (CommonMark 0.31, section 4.5, backticks alone).

    A block of any language opens: else the end of one in another language would be read as the program's beginning.
    Line by line, as a regular expression over the whole text takes quadratic time where no block ends.
    """
    language, lines = None, list[str]()
    for line in text.split("\n"):
        bare = line.lstrip(" ")
        is_fence = bare.startswith(_FENCE) and len(line) - len(bare) <= _MAX_FENCE_INDENT
        info = bare.removeprefix(_FENCE).strip()
        if language is None:
            if is_fence and "`" not in info:
                language, lines = (info.split() or [""])[0], []
        elif is_fence and not info:
            yield language, "".join(lines)
            language = None
        else:
            lines.append(f"{line}\n")


def _prompt_preamble(prompt: str) -> str:
    """Prompt as trusted code for the helpers that tests use; empty where it does not compile."""
    text = f"{prompt}\n    pass\n"
    try:
        compile(text, "prompt.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return ""
    return text
