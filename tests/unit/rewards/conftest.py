"""What was tried against the sandbox, as a table at the end of the test run."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tasks.core.errors import ConfigError
from tasks.core.sections.code_rule import CodeRule
from tasks.rewards.sandbox.run import Sandbox

# Attack → what happened, and what it won.
_attacks: dict[str, tuple[str, str]] = {}


def sandbox_or_skip(options: CodeRule) -> Sandbox:
    """Skip where this machine has no sandbox, but never where it has one that does not hold."""
    try:
        return Sandbox(options)
    except ConfigError as error:
        if "does not hold" in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture
def walls() -> None:
    """For tests that run programs behind them."""
    sandbox_or_skip(CodeRule())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    for name, happened, won in (value for key, value in report.user_properties if key == "attack"):
        _attacks[name] = (happened, won)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Every attack, and how many succeeded."""
    if not _attacks:
        return
    terminalreporter.section("attacks on the sandbox")
    terminalreporter.write_line("| attack | what happened | success |\n|---|---|---|")
    for name, (happened, won) in _attacks.items():
        terminalreporter.write_line(f"| {name} | {happened} | {won or 'no'} |")
    succeeded = sum(bool(won) for _, won in _attacks.values())
    terminalreporter.write_line(f"{len(_attacks)} attacks, {succeeded} succeeded")
