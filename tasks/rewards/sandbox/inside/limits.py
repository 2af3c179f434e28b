"""Resource limits and seccomp filter that a process sets on itself before it runs untrusted code."""

from __future__ import annotations

import ctypes
import os
import resource

__all__ = ["confine", "take_stdio"]

# linux/prctl.h, linux/seccomp.h
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 4, 22, 38, 2

OPEN_FILES = 64


class _Program(ctypes.Structure):
    """`struct sock_fprog`: eight bytes an instruction."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def confine(cpu_seconds: int, memory: int, file_size: int, instructions: bytes) -> None:
    """Set resource limits and, where given, the seccomp filter of this process; neither can be undone."""
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
    if instructions:
        _install_filter(instructions)


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


def take_stdio() -> tuple[int, int]:
    """Take over standard input and output as a channel; afterwards stdin is empty, and prints go to standard error."""
    requests, answers = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    return requests, answers
