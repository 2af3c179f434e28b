"""Test process: run the tests against a proxy of the program's function, and report the result.

The result leaves by a pipe that exists in this process alone. What is wrong with the channel ends the process on the
spot, so that no `except` in the tests can swallow it. Tests are invalid by what they do before any answer alone; what
happens from their first call on is the program's doing. Without a program, they are tried on `TRIVIAL_ANSWERS`.
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
    from collections.abc import Callable
    from typing import Any, NoReturn

__all__ = ["main"]

_MAX_MESSAGE = 1 << 26
_PROMPT, _TESTS = "prompt.py", "tests.py"

# An iterator that the program ends would end `all(map(f, cases))` early, and with it the tests.
_UNSAFE_EXCEPTIONS = {"StopIteration", "StopAsyncIteration"}


class ProgramError(RuntimeError):
    """The program raised something that is no ordinary builtin exception."""


def _raise_something() -> NoReturn:
    raise ProgramError


# What a program that computes nothing gives for every call.
TRIVIAL_ANSWERS: dict[str, Callable[[], object]] = {
    "None": lambda: None, "NaN": lambda: float("nan"), "[]": list, "''": str, "an exception": _raise_something,
}  # fmt: skip


def main() -> None:
    """Run the tests of the job on standard input; arguments: those of `start`, and the two ends of the channel."""
    job, results, answer_size = start()
    channel = Channel(int(sys.argv[7]), int(sys.argv[8]), results, answer_size)
    spec: Any = codec.decode(codec.read_frame(job, _MAX_MESSAGE) or b"")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    if spec["program"] is None:
        _try_trivial_answers(channel, spec)
    channel.load(spec.pop("program"), spec["name"])
    _run(channel, spec)


class _Calls:
    """Calls of the function so far, what the last one raised, and all the exceptions that the tests were given."""

    def __init__(self) -> None:
        self.calls = 0
        self.raised: str | None = None
        self.errors: list[Exception] = []


class Channel(_Calls):
    """Channel to the program's process, by its two ends, and the pipe of the result."""

    def __init__(self, requests: int, answers: int, results: int, answer_size: int) -> None:
        super().__init__()
        self._requests, self._answers, self._results, self._limit = requests, answers, results, answer_size
        self._ready = False

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
        self.calls += 1
        self.raised = None
        kind, detail = self._request("call", list(arguments), keywords)
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
        text = self.encode_request((ticket, *request), self.calls == 1)
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

    def encode_request(self, request: tuple[object, ...], is_first_call: bool) -> bytes:
        """Encode a request; what the tests pass in their first call depends on no answer."""
        try:
            return codec.encode(request, _MAX_MESSAGE)
        except ValueError as error:
            self.end("invalid" if is_first_call else "refused", f"the tests pass {error}")

    def _read_answer(self) -> object:
        try:
            text = codec.read_frame(self._answers, self._limit)
            if text is None:
                self._peer_closed()
            return codec.decode(text)
        except codec.MessageTooLargeError:
            self.end("output_limit", "a result is too large")
        except MemoryError:
            pass  # with the exception goes what was read of it, which makes room for the result
        except Exception:
            self.end("refused", "the program's answer is no plain data")
        self.end("memory", "MemoryError while the tests read a result")

    def _raise(self, name: object) -> NoReturn:
        """Raise the reported exception."""
        self.raised = _sanitise(name)
        if self.raised == "MemoryError":
            self.end("memory", "MemoryError in the function")
        self.errors.append(_make_exception(self.raised))
        raise self.errors[-1]

    def _write_back(self, arguments: tuple[Any, ...], changed_arguments: object) -> None:
        """Copy the program's changes into mutable arguments."""
        if type(changed_arguments) is not list or len(changed_arguments) != len(arguments):
            self.end("refused", "the program's answer lacks the arguments")
        for argument, changed in zip(arguments, changed_arguments, strict=True):
            if type(argument) is type(changed) and type(argument) in (list, dict, set):
                argument.clear()
                add = argument.extend if type(argument) is list else argument.update
                add(changed)


class _Ended(BaseException):
    """Status and reason of tests that ran without a program."""


class _ConstantChannel(_Calls):
    """Channel to no program: each call gives the same."""

    def __init__(self, channel: Channel, answer: Callable[[], object]) -> None:
        super().__init__()
        self._channel, self._answer = channel, answer

    def call(self, arguments: tuple[Any, ...], keywords: dict[str, Any], _in_place: bool) -> object:
        self.calls += 1
        if self.calls == 1:
            self._channel.encode_request((arguments, keywords), is_first_call=True)
        try:
            return self._answer()
        except ProgramError as error:
            self.errors.append(error)
            raise

    def check_no_unsolicited(self) -> None:
        """There is no program that could send any."""

    def end(self, status: str, reason: str) -> NoReturn:
        raise _Ended(status, reason)


def _try_trivial_answers(channel: Channel, spec: dict[str, Any]) -> NoReturn:
    """End with `passed` and the names of those that pass the tests, or with `failed`."""
    passing = []
    for name, answer in TRIVIAL_ANSWERS.items():
        constant = _ConstantChannel(channel, answer)
        try:
            _run(constant, spec)
        except _Ended as ended:
            status, reason = ended.args
        if not constant.calls:
            channel.end("invalid", reason)
        if status == "passed":
            passing.append(name)
    channel.end("passed" if passing else "failed", ", ".join(passing))


def _make_exception(name: str) -> Exception:
    """Make the exception of this name where it is an ordinary builtin one, which tests may expect."""
    kind = getattr(builtins, name, None)
    if name in _UNSAFE_EXCEPTIONS or not (isinstance(kind, type) and issubclass(kind, Exception)):
        return ProgramError(name)
    if "unittest" in sys.modules:
        kind = type(name, (kind,), {"with_traceback": _note_caught})
    try:
        return kind()
    except TypeError:  # UnicodeDecodeError and its like need arguments
        return ProgramError(name)


def _note_caught(error: Exception, traceback: Any) -> Exception:
    """`with_traceback`, by which unittest's `assertRaises` takes the traceback off what it caught."""
    error.caught = True  # type: ignore[attr-defined]
    return Exception.with_traceback(error, traceback)


def _caught_by_tests(error: Exception) -> bool:
    """Whether an `except` or `with` of the tests themselves caught the exception of a call.

    The language and its library take an IndexError of `__getitem__` for the end of a loop, an AttributeError for a
    missing attribute, a KeyError for a missing key, and more. C code does so without a trace, or after the exception
    has ended the last frame that it reached; library code in a frame of its own.
    """
    if error.__traceback__ is None:
        return hasattr(error, "caught")
    from opcode import opname

    frame = error.__traceback__.tb_frame
    operation = opname[frame.f_code.co_code[frame.f_lasti]]
    return frame.f_code.co_filename in (_PROMPT, _TESTS) and operation.startswith(("RETURN_", "YIELD_", "RESUME"))


def _run(channel: Channel | _ConstantChannel, spec: dict[str, Any]) -> NoReturn:
    """Run the tests: their statements, then a function `check` if they define one."""
    name = spec["name"]

    def candidate(*arguments: Any, **keywords: Any) -> Any:
        return channel.call(arguments, keywords, spec["in_place"])

    candidate.__name__ = name
    namespace: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(spec["preamble"], _PROMPT, "exec"), namespace)
        namespace |= {name: candidate, "candidate": candidate}
        exec(compile(spec["tests"], _TESTS, "exec"), namespace)
        if callable(check := namespace.get("check")) and check is not candidate:
            check(candidate)
    except BaseException as error:
        _report_failure(channel, error)
    channel.check_no_unsolicited()
    if not channel.calls:
        channel.end("invalid", f"they never call {name}")
    for raised in channel.errors:
        if not _caught_by_tests(raised):
            channel.end("error", f"{type(raised).__name__}, which no `except` of the tests caught")
    channel.end("passed", "")


def _report_failure(channel: Channel | _ConstantChannel, error: BaseException) -> NoReturn:
    kind = type(error).__name__
    if isinstance(error, MemoryError):
        channel.end("memory", "MemoryError in the tests")
    if not channel.calls:
        channel.end("invalid", f"{kind} before they call the function: {error}")
    if channel.raised is not None and kind in (channel.raised, ProgramError.__name__):
        channel.end(*_exception_result(channel.raised, f"in call {channel.calls}"))
    channel.end("failed", f"{kind} after call {channel.calls}")


def _exception_result(name: object, where: str) -> tuple[str, str]:
    return "memory" if name == "MemoryError" else "error", f"{_sanitise(name)} {where}"


def _sanitise(text: object) -> str:
    """Sanitise text that the program chose, for logs; it may have sent anything in its place."""
    return "".join(char for char in text[:100] if char.isalnum() or char in "_. ") if isinstance(text, str) else ""
