"""Scores by name of a rule, and a sandbox for the tests that need one."""

import pytest

from tasks.config.rules import RULE_OPTIONS, CodeRule
from tasks.core.errors import ConfigError
from tasks.rewards.rules import RULES
from tasks.rewards.sandbox.sandbox import Sandbox


def score(rule: str, response: str, answer: str | None = None, **options: object) -> float:
    """The value of a rule with these options for one response to the prompt `p`."""
    answers = {} if answer is None else {"p": answer}
    return RULES[rule](RULE_OPTIONS[rule](function=rule, **options), answers).score("p", response)


def sandbox_or_skip(options: CodeRule) -> Sandbox:
    """Skip where this machine has no sandbox, but never where it has one that does not hold."""
    try:
        return Sandbox(options)
    except ConfigError as error:
        if "does not hold" in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture
def sandboxed() -> None:
    """For tests that run programs in the sandbox."""
    sandbox_or_skip(CodeRule())
