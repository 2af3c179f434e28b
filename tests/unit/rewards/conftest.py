"""What was tried against the sandbox, as a table at the end of the test run."""

from __future__ import annotations

from collections.abc import Generator

import pytest

# Attack → what happened, and what it won.
_attacks: dict[str, tuple[str, str]] = {}


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
