"""The tests' side: run them with a function that asks the program's process, and say how they ended.

The verdict leaves by a pipe that exists in this process alone. Anything that is wrong with the channel ends the
process with its verdict on the spot, so that no `except` in the tests can swallow it.
"""

from __future__ import annotations

import builtins
import os
import select
import sys

from tasks.rewards.sandbox.inside import wire
from tasks.rewards.sandbox.inside.confine import confine, take_channel

TYPE_CHECKING = False  # as in `typing`, whose import takes as long as a third of Python's start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

__all__ = ["main"]

_ROOM = 1 << 26

# An iterator that the program ends would end `all(map(f, cases))` early, and with it the tests.
_NOT_TOLD = {"StopIteration", "StopAsyncIteration"}


class ProgramError(RuntimeError):
    """The program raised something that is no ordinary builtin exception."""


def main() -> None:
    """Arguments: as those of `serve`, and the two ends of the channel."""
    cpu_seconds, memory, file_size, answer_size = map(int, sys.argv[2:6])
    instructions = bytes.fromhex(sys.argv[6])
    job, verdicts = take_channel()
    channel = Channel(int(sys.argv[7]), int(sys.argv[8]), verdicts, answer_size)
    confine(cpu_seconds, memory, file_size, instructions)
    text = wire.read_frame(job, _ROOM)
    given: Any = wire.decode(text or b"")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    channel.load(given["program"], given["name"])
    _run(channel, given["preamble"], given["tests"], given["name"], given["in_place"])


class Channel:
    """The way to the program's process and, for the verdict, out of this one."""

    def __init__(self, requests: int, answers: int, verdicts: int, answer_size: int) -> None:
        """The two ends that lead to the program, and the one that leads out."""
        self._requests, self._answers, self._verdicts, self._limit = requests, answers, verdicts, answer_size
        self._ready = False
        self.calls = 0
        self.raised: str | None = None

    def end(self, status: str, reason: str) -> NoReturn:
        """Give the verdict and end this process."""
        wire.write_frame(self._verdicts, wire.encode((status, reason[:300], self.calls), 1 << 12))
        os._exit(0)

    def load(self, program: str, name: str) -> None:
        """Wait until the program's process is ready, and give it the program."""
        self._ready = self._answer() == "ready"
        kind, detail = self._ask("load", program, name)
        if kind == "missing":
            self.end("error", f"the program defines no function {name}")
        if kind != "loaded":
            self.end(*_of_exception(detail, "while the program was loaded"))

    def call(self, arguments: tuple[Any, ...], keywords: dict[str, Any], in_place: bool) -> Any:
        """What the program's function returned, as plain data; what it raised is raised."""
        kind, detail = self._ask("call", list(arguments), keywords)
        self.calls += 1
        self.raised = None
        if kind == "raised":
            self._raise(detail)
        if kind != "returned" or type(detail) is not tuple or len(detail) != 2:
            self.end("refused", "the program's answer is none")
        result, after = detail
        if in_place:
            self._write_back(arguments, after)
        return result

    def check_silence(self) -> None:
        """Refuse a program that says something unasked."""
        if select.select([self._answers], [], [], 0)[0]:
            if not os.read(self._answers, 1):
                self._lost()
            self.end("refused", "the program answered what it was not asked")

    def _lost(self) -> NoReturn:
        """The program's process has ended, or has let go of the channel."""
        self.end("died" if self._ready else "broken", "")

    def _ask(self, *request: object) -> tuple[str, Any]:
        """The answer's kind and content; the ticket, unknown before, shows that it answers this very request."""
        self.check_silence()
        ticket = os.urandom(8).hex()
        try:
            text = wire.encode((ticket, *request), _ROOM)
        except ValueError as error:
            self.end("refused", f"the tests pass {error}")
        try:
            wire.write_frame(self._requests, text)
        except BrokenPipeError:
            self._lost()
        answer = self._answer()
        if type(answer) is not tuple or len(answer) != 3 or answer[0] != ticket:
            self.end("refused", "the program answered something else than it was asked")
        if answer[1] == "too large":
            self.end("output_limit", "a result is too large")
        if answer[1] == "not plain":
            self.end("refused", f"the function returned {_plain(answer[2])}")
        return answer[1], answer[2]

    def _answer(self) -> object:
        try:
            text = wire.read_frame(self._answers, self._limit)
            if text is None:
                self._lost()
            return wire.decode(text)
        except wire.TooLargeError:
            self.end("output_limit", "a result is too large")
        except wire.NotPlainError:
            self.end("refused", "the program's answer is no plain data")

    def _raise(self, name: object) -> NoReturn:
        """What the program says that it raised, as far as tests may expect it: an ordinary builtin exception."""
        self.raised = _plain(name)
        if self.raised == "MemoryError":
            self.end("memory", "MemoryError in the function")
        kind = getattr(builtins, self.raised, None)
        if isinstance(kind, type) and issubclass(kind, Exception) and self.raised not in _NOT_TOLD:
            try:
                raised = kind()
            except TypeError:  # UnicodeDecodeError and its like need arguments
                raised = ProgramError(self.raised)
            raise raised
        raise ProgramError(self.raised)

    def _write_back(self, arguments: tuple[Any, ...], after: object) -> None:
        """Give arguments that can change what the program left in them."""
        if type(after) is not list or len(after) != len(arguments):
            self.end("refused", "the program's answer lacks the arguments")
        for own, changed in zip(arguments, after, strict=True):
            if type(own) is list and type(changed) is list:
                own[:] = changed
            elif (type(own) is dict and type(changed) is dict) or (type(own) is set and type(changed) is set):
                own.clear()
                own.update(changed)


def _run(channel: Channel, preamble: str, tests: str, name: str, in_place: bool) -> NoReturn:
    """Run the tests to their end; plain statements have run by then, a function `check` is called."""
    candidate = _candidate(channel, name, in_place)
    namespace: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(preamble, "prompt.py", "exec"), namespace)
        namespace |= {name: candidate, "candidate": candidate}
        exec(compile(tests, "tests.py", "exec"), namespace)
        if callable(check := namespace.get("check")) and check is not candidate:
            check(candidate)
    except BaseException as error:
        _failed(channel, error)
    channel.check_silence()
    if not channel.calls:
        channel.end("invalid", f"they never call {name}")
    channel.end("passed", "")


def _failed(channel: Channel, error: BaseException) -> NoReturn:
    kind = type(error).__name__
    if not channel.calls:
        channel.end("invalid", f"{kind} before they call the function: {error}")
    if isinstance(error, MemoryError):
        channel.end("memory", "MemoryError in the tests")
    if channel.raised is not None and kind in (channel.raised, ProgramError.__name__):
        channel.end(*_of_exception(channel.raised, f"in call {channel.calls}"))
    channel.end("failed", f"{kind} after call {channel.calls}")


def _candidate(channel: Channel, name: str, in_place: bool) -> Callable[..., Any]:
    def candidate(*arguments: Any, **keywords: Any) -> Any:
        return channel.call(arguments, keywords, in_place)

    candidate.__name__ = name
    return candidate


def _of_exception(name: object, where: str) -> tuple[str, str]:
    plain = _plain(name)
    return ("memory" if plain == "MemoryError" else "error"), f"{plain} {where}"


def _plain(text: object) -> str:
    """Words of the program's choosing, cut to what a log can bear."""
    return "".join(char for char in str(text)[:100] if char.isalnum() or char in "_. ")
