"""Fixture of tests that need the sandbox."""

from __future__ import annotations

import pytest

from tasks.config.rules import CodeRule
from tasks.core.errors import ConfigError
from tasks.rewards.sandbox.sandbox import Sandbox


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
