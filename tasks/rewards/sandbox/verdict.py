"""Result of a sandboxed program."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["SandboxResult", "Status"]


class Status(StrEnum):
    """Outcome of a program."""

    PASSED = "passed"
    FAILED = "failed"
    """A test did not hold."""
    ERROR = "error"
    """The program could not be loaded, lacks the function, raised something, or ended."""
    TIMEOUT = "timeout"
    MEMORY = "memory"
    OUTPUT_LIMIT = "output_limit"
    """It printed too much, or a result is too large."""
    REFUSED = "refused"
    """There is no program, a result is no plain data, or the program does not keep to calls and answers."""


@dataclass(frozen=True)
class SandboxResult:
    """Status, and a reason for people; programs can influence the reason, so no code may depend on it."""

    status: Status
    reason: str = ""
