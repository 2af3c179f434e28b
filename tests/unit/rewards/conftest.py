"""Scores by name of a rule, and a sandbox for the tests that need one."""

import shutil
import subprocess
from functools import cache

import pytest

from tasks.config.rules import RULE_OPTIONS, CodeRule
from tasks.rewards.rules import RULES
from tasks.rewards.sandbox.sandbox import Sandbox


def score(rule: str, response: str, answer: str | None = None, **options: object) -> float:
    """The value of a rule with these options for one response to the prompt `p`."""
    answers = {} if answer is None else {"p": answer}
    return RULES[rule](RULE_OPTIONS[rule](function=rule, **options), answers).score("p", response)


def sandbox_or_skip(options: CodeRule) -> Sandbox:
    """Skip where this machine cannot have a sandbox; where it can, whatever is wrong with ours is a failure."""
    if missing := _missing():
        pytest.skip(missing)
    return Sandbox(options)


@cache
def _missing() -> str:
    """What this machine lacks for any sandbox: bubblewrap, seccomp, or the kernel's leave to unshare."""
    if shutil.which("bwrap") is None:
        return "no bubblewrap on this machine"
    try:
        import pyseccomp  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        return f"no seccomp on this machine: {error}"
    bare = ["bwrap", "--unshare-all", "--unshare-user", "--ro-bind", "/", "/", "true"]
    run = subprocess.run(bare, capture_output=True, text=True, check=False)
    return f"bubblewrap does not work on this machine: {run.stderr.strip()}" if run.returncode else ""


@pytest.fixture
def sandboxed() -> None:
    """For tests that run programs in the sandbox."""
    sandbox_or_skip(CodeRule())
