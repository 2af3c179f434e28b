"""The process that compares mathematical answers: a line [expected, response] in, a line true, false or the error out.

It imports nothing of this project, so that it starts in the time that sympy takes.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from collections.abc import Iterable
from typing import IO

__all__ = ["answers_equal", "worker_loop"]

MEMORY_BYTES = 4 * 2**30
"""Bytes that one comparison may take; a power tower asks for more than any machine has."""


def answers_equal(expected: str, response: str) -> bool:
    """Whether math-verify finds the expected answer in the response.

    Its own clocks are off: they make a plain false of what is late, which the parent process counts as a failure.

    Raises:
        ValueError: the expected answer is no mathematics.
    """
    from math_verify import parse, verify

    # Only what stands in a mathematical environment is read as LaTeX.
    marked = expected if "$" in expected or "\\boxed" in expected else f"${expected}$"
    gold, parsed = (parse(text, parsing_timeout=None, raise_on_error=True) for text in (marked, response))
    if not gold:
        raise ValueError(f"the right answer {expected!r} is no mathematics")
    return bool(verify(gold, parsed, timeout_seconds=None, raise_on_error=True))


def worker_loop(requests: Iterable[str], answers: IO[str]) -> None:
    """Answer line by line, until there are no more."""
    import math_verify  # noqa: F401  (the first line says that this is done)

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its clocks are off
    print("ready", file=answers, flush=True)
    for line in requests:
        expected, response = json.loads(line)
        try:
            result: bool | str = answers_equal(expected, response)
        except (Exception, MemoryError) as error:
            result = f"{type(error).__name__}: {error}"
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    worker_loop(sys.stdin, sys.stdout)
