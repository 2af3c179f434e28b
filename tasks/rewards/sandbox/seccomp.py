"""Seccomp allow-list: the system calls that Python needs to compute and to use its scratch files.

Everything else fails with EPERM, so what a newer kernel adds is forbidden until someone adds it here. Missing with
intent: new processes and threads (clone, fork, vfork, execve), signals to others (kill, tgkill), sockets, namespaces
and mounts, ptrace and other processes' memory, kernel interfaces (bpf, io_uring, keyctl, perf_event_open, …), links and
modes of files, and memory that no limit counts (memfd_create, System V and POSIX queues).
"""

from __future__ import annotations

import errno
import tempfile
from functools import lru_cache

from tasks.core.errors import ConfigError

__all__ = ["ALLOWED", "IOCTLS", "seccomp_program"]

ALLOWED = (
    # memory and time
    "brk", "mmap", "munmap", "mremap", "mprotect", "madvise", "msync", "mincore",
    "clock_gettime", "clock_getres", "clock_nanosleep", "nanosleep", "gettimeofday", "time", "times", "getrusage",
    "getitimer", "setitimer", "alarm", "pause", "restart_syscall",
    # open files
    "read", "readv", "pread64", "preadv", "write", "writev", "pwrite64", "pwritev", "lseek", "close", "close_range",
    "dup", "dup2", "dup3", "fcntl", "flock", "fsync", "fdatasync", "ftruncate", "fallocate", "copy_file_range",
    "sendfile", "pipe", "pipe2", "poll", "ppoll", "select", "pselect6",
    # files by name
    "open", "openat", "stat", "lstat", "fstat", "newfstatat", "statx", "statfs", "fstatfs", "access", "faccessat",
    "faccessat2", "readlink", "readlinkat", "getcwd", "chdir", "fchdir", "getdents64", "mkdir", "mkdirat", "rmdir",
    "unlink", "unlinkat", "rename", "renameat", "renameat2", "truncate", "umask", "utimensat",
    # itself
    "getpid", "getppid", "gettid", "getpgrp", "getpgid", "getsid", "getuid", "geteuid", "getgid", "getegid",
    "getgroups",
    "getresuid", "getresgid", "getrlimit", "uname", "sysinfo", "getrandom", "futex", "set_robust_list",
    "set_tid_address", "rseq", "membarrier", "sched_yield", "sched_getaffinity", "rt_sigaction", "rt_sigprocmask",
    "rt_sigreturn", "rt_sigpending", "rt_sigtimedwait", "rt_sigsuspend", "sigaltstack", "exit", "exit_group",
)  # fmt: skip

IOCTLS = (0x5401, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS (isatty), FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: linux asm-generic/ioctls.h."""


@lru_cache(maxsize=1)
def seccomp_program() -> bytes:
    """Compile the list for the kernel: a program of the classic Berkeley packet filter.

    Raises:
        ConfigError: libseccomp or its binding is not installed.
    """
    try:
        import pyseccomp as seccomp
    except (ImportError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"the sandbox needs seccomp: {error}; `pip install -e '.[code]'`, and the system's libseccomp "
            "(`apt-get install libseccomp2`)"
        ) from error
    rules = seccomp.SyscallFilter(seccomp.ERRNO(errno.EPERM))
    for name in ALLOWED:
        if seccomp.resolve_syscall(seccomp.system_arch(), name) >= 0:  # not every architecture has the old ones
            rules.add_rule(seccomp.ALLOW, name)
    for number in IOCTLS:
        rules.add_rule(seccomp.ALLOW, "ioctl", seccomp.Arg(1, seccomp.EQ, number))
    # Reading its own limits, not setting them.
    rules.add_rule(seccomp.ALLOW, "prlimit64", seccomp.Arg(0, seccomp.EQ, 0), seccomp.Arg(2, seccomp.EQ, 0))
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()
