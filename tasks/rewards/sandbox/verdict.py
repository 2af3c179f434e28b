"""How a program fared, in one of few words."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Status", "SandboxResult"]


class Status(StrEnum):
    """What became of a program."""

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
    """A status, and a reason of a few words for people; programs can choose words of it, so nothing may hang on it."""

    status: Status
    reason: str = ""
