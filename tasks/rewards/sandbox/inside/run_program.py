"""Program process: load the program and serve calls of its function. It has no access to tests or result.

Whatever a program does to this process, to its channel or to the types that it returns, it can only answer calls, the
purpose of this process.
"""

from __future__ import annotations

import os
import sys

from tasks.rewards.sandbox.inside import codec
from tasks.rewards.sandbox.inside.limits import confine, take_stdio

TYPE_CHECKING = False  # as in `typing`, whose import takes as long as a third of Python's start
if TYPE_CHECKING:
    from typing import Any

__all__ = ["main"]

_MAX_MESSAGE = 1 << 26  # bytes of a request: it comes from our side


def main() -> None:
    """Arguments: CPU seconds, bytes of memory, of files and of one answer, the filter in hex."""
    cpu_seconds, memory, file_size, answer_size = map(int, sys.argv[2:6])
    instructions = bytes.fromhex(sys.argv[6])
    requests, answers = take_stdio()
    confine(cpu_seconds, memory, file_size, instructions)
    codec.write_frame(answers, codec.encode("ready", 16))
    function: Any = None
    while (text := codec.read_frame(requests, _MAX_MESSAGE)) is not None:
        request: Any = codec.decode(text)
        if request[1] == "load":
            function, answer = _load(request[2], request[3])
        else:
            answer = _call(function, request[2], request[3])
        codec.write_frame(answers, _encode_answer(request[0], answer, answer_size))
    os._exit(0)  # no atexit, no threads, no finalisers


def _load(program: str, name: str) -> tuple[Any, tuple[object, ...]]:
    """Load the program: its function, and the answer to `load`."""
    namespace: dict[str, Any] = {"__name__": "program"}
    try:
        exec(compile(program, "program.py", "exec"), namespace)
    except BaseException as error:
        return None, ("raised", type(error).__name__)
    if not callable(namespace.get(name)):
        return None, ("missing", name)
    return namespace[name], ("loaded", None)


def _call(function: Any, arguments: list[Any], keywords: dict[str, Any]) -> tuple[object, ...]:
    try:
        return "returned", (function(*arguments, **keywords), arguments)
    except BaseException as error:
        return "raised", type(error).__name__


def _encode_answer(ticket: str, answer: tuple[object, ...], limit: int) -> bytes:
    try:
        return codec.encode((ticket, *answer), limit)
    except codec.MessageTooLargeError:
        return codec.encode((ticket, "too large", None), limit)
    except codec.UnsupportedTypeError as error:
        return codec.encode((ticket, "not plain", str(error)[:200]), limit)
    except BaseException as error:  # a type of the program's own that raises while it is read
        return codec.encode((ticket, "raised", type(error).__name__[:200]), limit)
