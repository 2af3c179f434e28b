"""What tests have shown, as tables at the end of the run: faults injected, and attacks on the sandbox.

The hooks are those of tests/conftest.py, the only one that pytest also loads where it leaves the tests to processes of
their own; what a test has to say comes from there with its report.
"""

from collections import Counter
from collections.abc import Generator

import pytest

__all__ = ["pytest_configure", "pytest_runtest_logreport", "pytest_runtest_makereport", "pytest_terminal_summary"]

# Fault → what happens then, and how the tests that injected it ended.
_faults: dict[tuple[str, str], Counter[str]] = {}

# Attack → what happened, and what it won.
_attacks: dict[str, tuple[str, str]] = {}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(name, outcome): injects this fault, and asserts this outcome")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    mark = item.get_closest_marker("fault")
    if mark and (report.when == "call" or not report.passed):
        report.user_properties.append(("fault", mark.args))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for key, value in report.user_properties:
        if key == "fault":
            _faults.setdefault(value, Counter())[report.outcome] += 1
        if key == "attack":
            name, happened, won = value
            _attacks[name] = (happened, won)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    write = terminalreporter.write_line
    if _faults:  # a test that failed proves nothing of its fault
        terminalreporter.section("faults")
        write("| fault | times injected | what happened | lost or corrupt |\n|---|---|---|---|")
    for (name, outcome), ends in _faults.items():
        times, failed = ends["passed"] + ends["failed"], ends["failed"]
        lost = f"{failed} failed, see above" if failed else "nothing" if times else "skipped"
        write(f"| {name} | {times} | {outcome} | {lost} |")
    if _attacks:
        terminalreporter.section("attacks on the sandbox")
        write("| attack | what happened | success |\n|---|---|---|")
        for name, (happened, won) in _attacks.items():
            write(f"| {name} | {happened} | {won or 'no'} |")
        write(f"{len(_attacks)} attacks, {sum(bool(won) for _, won in _attacks.values())} succeeded")
