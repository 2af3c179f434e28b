"""Worker process that compares answers: reads lines [expected, response], writes true, false or an error.

It imports nothing of this project: it runs as a file, and must start fast.
"""

import json
import logging
import resource
import sys

__all__ = ["answers_equal"]

MEMORY_BYTES = 4 * 2**30  # a power tower asks for more than any machine has


def answers_equal(expected: str, response: str) -> bool:
    """Whether math-verify finds the expected answer in the response; its own timeouts are off.

    Raises:
        ValueError: the expected answer is no mathematics.
    """
    from math_verify import parse, verify

    # Only text in a mathematical environment is parsed as LaTeX.
    marked = expected if "$" in expected or "\\boxed" in expected else f"${expected}$"
    gold, parsed = (parse(text, parsing_timeout=None, raise_on_error=True) for text in (marked, response))
    if not gold:
        raise ValueError(f"the right answer {expected!r} is no mathematics")
    return bool(verify(gold, parsed, timeout_seconds=None, raise_on_error=True))


def main() -> None:
    """Answer requests line by line, until there are no more."""
    import math_verify  # noqa: F401  (the line "ready" follows this import)

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off
    print("ready", flush=True)
    for line in sys.stdin:
        expected, response = json.loads(line)
        try:
            result: bool | str = answers_equal(expected, response)
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    main()
