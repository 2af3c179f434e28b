"""The process that compares mathematical answers: a line [expected, response] in, a line true, false or the error out.

It imports nothing of this project, so that it starts in the time that sympy takes.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterable
from typing import IO

__all__ = ["equal", "serve"]

MEMORY = 4 * 2**30
"""Bytes that one comparison may take; a power tower asks for more than any machine has."""


def equal(expected: str, response: str) -> bool:
    """Whether math-verify finds the expected answer in the response."""
    from math_verify import parse, verify

    # Only what stands in a mathematical environment is read as LaTeX.
    gold = expected if "$" in expected or "\\boxed" in expected else f"${expected}$"
    return bool(verify(parse(gold), parse(response)))


def serve(questions: Iterable[str], answers: IO[str]) -> None:
    """Answer line by line, until there are no more."""
    import math_verify  # noqa: F401  (the first line says that this is done)

    print("ready", file=answers, flush=True)
    for line in questions:
        expected, response = json.loads(line)
        try:
            said: bool | str = equal(expected, response)
        except (Exception, MemoryError) as error:
            said = f"{type(error).__name__}: {error}"
        print(json.dumps(said), file=answers, flush=True)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    serve(sys.stdin, sys.stdout)
