"""Test process: run the tests against a proxy of the program's function, and report the result.

The result leaves by a pipe that exists in this process alone. What is wrong with the channel ends the process on the
spot, so that no `except` in the tests can swallow it.
"""

from __future__ import annotations

import builtins
import os
import select
import sys

from tasks.rewards.sandbox.inside import codec
from tasks.rewards.sandbox.inside.run_program import start

TYPE_CHECKING = False  # as in `typing`, whose import takes as long as a third of Python's start
if TYPE_CHECKING:
    from typing import Any, NoReturn

__all__ = ["main"]

_MAX_MESSAGE = 1 << 26

# An iterator that the program ends would end `all(map(f, cases))` early, and with it the tests.
_UNSAFE_EXCEPTIONS = {"StopIteration", "StopAsyncIteration"}


class ProgramError(RuntimeError):
    """The program raised something that is no ordinary builtin exception."""


def main() -> None:
    """Run the tests of the job on standard input; arguments: those of `start`, and the two ends of the channel."""
    job, results, answer_size = start()
    channel = Channel(int(sys.argv[7]), int(sys.argv[8]), results, answer_size)
    text = codec.read_frame(job, _MAX_MESSAGE)
    spec: Any = codec.decode(text or b"")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    channel.load(spec["program"], spec["name"])
    _run(channel, spec["preamble"], spec["tests"], spec["name"], spec["in_place"])


class Channel:
    """Channel to the program's process, by its two ends, and the pipe of the result."""

    def __init__(self, requests: int, answers: int, results: int, answer_size: int) -> None:
        self._requests, self._answers, self._results, self._limit = requests, answers, results, answer_size
        self._ready = False
        self.calls = 0
        self.raised: str | None = None

    def end(self, status: str, reason: str) -> NoReturn:
        """Write the result and end this process."""
        codec.write_frame(self._results, codec.encode((status, reason[:300], self.calls), 1 << 12))
        os._exit(0)

    def load(self, program: str, name: str) -> None:
        """Wait until the program's process is ready, and send it the program."""
        self._ready = self._read_answer() == "ready"
        kind, detail = self._request("load", program, name)
        if kind == "missing":
            self.end("error", f"the program defines no function {name}")
        if kind != "loaded":
            self.end(*_exception_result(detail, "while the program was loaded"))

    def call(self, arguments: tuple[Any, ...], keywords: dict[str, Any], in_place: bool) -> Any:
        """Call the program's function; return its result as plain data, or raise its exception."""
        kind, detail = self._request("call", list(arguments), keywords)
        self.calls += 1
        self.raised = None
        if kind == "raised":
            self._raise(detail)
        if kind != "returned" or type(detail) is not tuple or len(detail) != 2:
            self.end("refused", "the program's answer is none")
        result, changed_arguments = detail
        if in_place:
            self._write_back(arguments, changed_arguments)
        return result

    def check_no_unsolicited(self) -> None:
        """Refuse a program that sends unsolicited data."""
        if select.select([self._answers], [], [], 0)[0]:
            if not os.read(self._answers, 1):
                self._peer_closed()
            self.end("refused", "the program answered what it was not asked")

    def _peer_closed(self) -> NoReturn:
        self.end("died" if self._ready else "broken", "")

    def _request(self, *request: object) -> tuple[str, Any]:
        """Send a request; return the kind and content of the answer, which must carry the request's random ticket."""
        self.check_no_unsolicited()
        ticket = os.urandom(8).hex()
        try:
            text = codec.encode((ticket, *request), _MAX_MESSAGE)
        except ValueError as error:
            self.end("refused", f"the tests pass {error}")
        try:
            codec.write_frame(self._requests, text)
        except BrokenPipeError:
            self._peer_closed()
        answer = self._read_answer()
        if type(answer) is not tuple or len(answer) != 3 or answer[0] != ticket:
            self.end("refused", "the program answered something else than it was asked")
        if answer[1] == "too large":
            self.end("output_limit", "a result is too large")
        if answer[1] == "not plain":
            self.end("refused", f"the function returned {_sanitise(answer[2])}")
        return answer[1], answer[2]

    def _read_answer(self) -> object:
        try:
            text = codec.read_frame(self._answers, self._limit)
            if text is None:
                self._peer_closed()
            return codec.decode(text)
        except codec.MessageTooLargeError:
            self.end("output_limit", "a result is too large")
        except codec.UnsupportedTypeError:
            self.end("refused", "the program's answer is no plain data")

    def _raise(self, name: object) -> NoReturn:
        """Raise the reported exception where it is an ordinary builtin one, which tests may expect."""
        self.raised = _sanitise(name)
        if self.raised == "MemoryError":
            self.end("memory", "MemoryError in the function")
        kind = getattr(builtins, self.raised, None)
        if isinstance(kind, type) and issubclass(kind, Exception) and self.raised not in _UNSAFE_EXCEPTIONS:
            try:
                raised = kind()
            except TypeError:  # UnicodeDecodeError and its like need arguments
                raised = ProgramError(self.raised)
            raise raised
        raise ProgramError(self.raised)

    def _write_back(self, arguments: tuple[Any, ...], changed_arguments: object) -> None:
        """Copy the program's changes into mutable arguments."""
        if type(changed_arguments) is not list or len(changed_arguments) != len(arguments):
            self.end("refused", "the program's answer lacks the arguments")
        for argument, changed in zip(arguments, changed_arguments, strict=True):
            if type(argument) is type(changed) and type(argument) in (list, dict, set):
                argument.clear()
                add = argument.extend if type(argument) is list else argument.update
                add(changed)


def _run(channel: Channel, preamble: str, tests: str, name: str, in_place: bool) -> NoReturn:
    """Run the tests: their statements, then a function `check` if they define one."""

    def candidate(*arguments: Any, **keywords: Any) -> Any:
        return channel.call(arguments, keywords, in_place)

    candidate.__name__ = name
    namespace: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(preamble, "prompt.py", "exec"), namespace)
        namespace |= {name: candidate, "candidate": candidate}
        exec(compile(tests, "tests.py", "exec"), namespace)
        if callable(check := namespace.get("check")) and check is not candidate:
            check(candidate)
    except BaseException as error:
        _report_failure(channel, error)
    channel.check_no_unsolicited()
    if not channel.calls:
        channel.end("invalid", f"they never call {name}")
    channel.end("passed", "")


def _report_failure(channel: Channel, error: BaseException) -> NoReturn:
    kind = type(error).__name__
    if not channel.calls:
        channel.end("invalid", f"{kind} before they call the function: {error}")
    if isinstance(error, MemoryError):
        channel.end("memory", "MemoryError in the tests")
    if channel.raised is not None and kind in (channel.raised, ProgramError.__name__):
        channel.end(*_exception_result(channel.raised, f"in call {channel.calls}"))
    channel.end("failed", f"{kind} after call {channel.calls}")


def _exception_result(name: object, where: str) -> tuple[str, str]:
    return "memory" if name == "MemoryError" else "error", f"{_sanitise(name)} {where}"


def _sanitise(text: object) -> str:
    """Sanitise text that the program chose, for logs."""
    return "".join(char for char in str(text)[:100] if char.isalnum() or char in "_. ")
