"""Program process: load the program and serve calls of its function, which is all that a program can make it do."""

from __future__ import annotations

import ctypes
import os
import resource
import sys

from tasks.rewards.sandbox.inside import codec

TYPE_CHECKING = False  # as in `typing`, whose import takes as long as a third of Python's start
if TYPE_CHECKING:
    from typing import Any

__all__ = ["main", "start"]

# linux/prctl.h, linux/seccomp.h
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 4, 22, 38, 2
OPEN_FILES = 64
_MAX_MESSAGE = 1 << 26  # bytes of a request: it comes from our side


def main() -> None:
    """Serve calls until there are no more; arguments: see `start`."""
    requests, answers, answer_size = start()
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


class _Program(ctypes.Structure):
    """`struct sock_fprog`: eight bytes an instruction."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def start() -> tuple[int, int, int]:
    """Confine this process for good; return its standard input and output as a channel, and the bytes of one answer.

    Arguments: CPU seconds, bytes of memory, of files and of one answer, the seccomp filter in hex or nothing.
    Afterwards stdin is empty, and prints go to standard error.
    """
    cpu_seconds, memory, file_size, answer_size = map(int, sys.argv[2:6])
    requests, answers, null = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    _limit_resources(cpu_seconds, memory, file_size)
    if instructions := bytes.fromhex(sys.argv[6]):
        _install_filter(instructions)
    return requests, answers, answer_size


def _limit_resources(cpu_seconds: int, memory: int, file_size: int) -> None:
    # At 1 the kernel writes no core and starts no handler; 0 would still start one (fs/coredump.c, core(5)).
    limits = {
        resource.RLIMIT_CORE: (1, 1),
        resource.RLIMIT_CPU: (cpu_seconds, cpu_seconds + 1),
        resource.RLIMIT_AS: (memory, memory),
        resource.RLIMIT_FSIZE: (file_size, file_size),
        resource.RLIMIT_NOFILE: (OPEN_FILES, OPEN_FILES),
    }
    for resource_id, (soft, hard) in limits.items():
        current_hard = resource.getrlimit(resource_id)[1]
        if current_hard != resource.RLIM_INFINITY:
            soft, hard = min(soft, current_hard), min(hard, current_hard)
        resource.setrlimit(resource_id, (soft, hard))


def _install_filter(instructions: bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    program = _Program(len(instructions) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    for arguments in (
        (PR_SET_DUMPABLE, 0, 0, 0, 0),
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0),
    ):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), f"prctl({arguments[0]}): {os.strerror(ctypes.get_errno())}")
