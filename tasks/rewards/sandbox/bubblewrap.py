"""Command line of a sandboxed Python: bubblewrap with only Python and its libraries mounted, and a seccomp allow-list.

What is not on the list fails with EPERM, so what a newer kernel adds is forbidden until someone adds it here. Missing
with intent: new processes and threads (clone, fork, vfork, execve), signals to others (kill, tgkill), sockets,
namespaces and mounts, ptrace and other processes' memory, kernel interfaces (bpf, io_uring, keyctl, perf_event_open,
…), links and modes of files, and memory that no limit counts (memfd_create, System V and POSIX queues).
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import sysconfig
import tempfile
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from tasks.core.errors import ConfigError
from tasks.rewards.sandbox import inside

if TYPE_CHECKING:
    from tasks.config.rules import CodeRule

__all__ = ["ALLOWED", "ENVIRONMENT", "command", "seccomp_program"]

SCRATCH = "/scratch"

# Equal hashes in every run make the order of a program's sets deterministic.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}

_PACKAGE_DIR = "/ours"
_NOBODY_UID = "65534"
_SYSTEM, _PYTHON = "/usr", Path("/python")
_BOOTSTRAP = "import sys; sys.path.insert(0, sys.argv[1]); from {module} import main; main()"

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
    "getgroups", "getresuid", "getresgid", "getrlimit", "uname", "sysinfo", "getrandom", "futex", "set_robust_list",
    "set_tid_address", "rseq", "membarrier", "sched_yield", "sched_getaffinity", "rt_sigaction", "rt_sigprocmask",
    "rt_sigreturn", "rt_sigpending", "rt_sigtimedwait", "rt_sigsuspend", "sigaltstack", "exit", "exit_group",
)  # fmt: skip

IOCTLS = (0x5401, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS (isatty), FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: linux asm-generic/ioctls.h."""


def command(module: ModuleType, options: CodeRule, *arguments: str) -> list[str]:
    """Command that starts a module of `inside` under the limits and the isolation of the options."""
    isolated = options.isolation == "bubblewrap"
    limits = options.cpu_seconds, options.memory_mb << 20, options.scratch_mb << 20, options.answer_kb << 10
    bwrap = _bwrap_args(options.scratch_mb << 20) if isolated else []
    python = _sandbox_path(_interpreter()) if isolated else str(_interpreter())
    package_root = _PACKAGE_DIR if isolated else str(Path(inside.__file__).parents[4])
    instructions = seccomp_program().hex() if isolated else ""
    return [
        # No site (-S, -s), no folder of the caller's on the path (-P), no byte code written (-B).
        *bwrap, python, "-S", "-s", "-P", "-B", "-c", _BOOTSTRAP.format(module=module.__name__),
        package_root, *map(str, limits), instructions, *arguments,
    ]  # fmt: skip


def _bwrap_args(scratch: int) -> list[str]:
    """Arguments of bubblewrap; the process is PID 1 of its namespace, so its end kills all others in it."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise ConfigError(
            "programs that a policy wrote run behind bubblewrap, and there is no `bwrap` on PATH: install it "
            "(`apt-get install bubblewrap`; Linux only), or set isolation: unsafe_no_isolation, under which a "
            "program can read and delete what you can"
        )
    arguments = [
        bwrap, "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--as-pid-1",
        "--cap-drop", "ALL", "--uid", _NOBODY_UID, "--gid", _NOBODY_UID, "--hostname", "sandbox", "--clearenv",
    ]  # fmt: skip
    environment = ENVIRONMENT | {"HOME": SCRATCH, "TMPDIR": SCRATCH}
    if sys.base_prefix != _SYSTEM:
        environment["LD_LIBRARY_PATH"] = f"{_PYTHON}/lib"  # where the linker looks for the library of that Python
    for name, value in environment.items():
        arguments += ["--setenv", name, value]
    package = Path(inside.__file__).parent
    return [
        *arguments, *_mounts(), "--ro-bind", str(package), f"{_PACKAGE_DIR}/tasks/rewards/sandbox/inside",
        "--dev-bind", "/dev/null", "/dev/null",
        "--size", str(scratch), "--tmpfs", SCRATCH, "--chdir", SCRATCH, "--remount-ro", "/",
    ]  # fmt: skip


@lru_cache(maxsize=1)
def _mounts() -> list[str]:
    """Python's executable, its standard library without installed packages, and the system's libraries; no `/etc`."""
    prefix = Path(sys.base_prefix).resolve()
    mounts: list[str] = []
    for path in ("/usr/lib", "/usr/lib64", "/lib", "/lib64"):
        mounts += ["--symlink", os.readlink(path)] if os.path.islink(path) else ["--ro-bind-try", path]
        mounts.append(path)
    for folder in (prefix / "lib", prefix / "lib64"):
        if folder.is_dir() and str(prefix) != _SYSTEM:
            mounts += ["--ro-bind", str(folder), _sandbox_path(folder)]
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}  # outside any virtual environment
    for packages in {sysconfig.get_path(name, vars=base) for name in ("purelib", "platlib")}:
        if Path(packages).is_dir():
            path = _sandbox_path(Path(packages))
            mounts += ["--tmpfs", path, "--remount-ro", path]
    return [*mounts, "--ro-bind", str(_interpreter()), _sandbox_path(_interpreter())]


def _sandbox_path(path: Path) -> str:
    """Path inside the sandbox of a file of Python's; it does not reveal the home folder."""
    prefix = Path(sys.base_prefix).resolve()
    return str(path if str(prefix) == _SYSTEM else _PYTHON / path.resolve().relative_to(prefix))


@lru_cache(maxsize=1)
def _interpreter() -> Path:
    """Executable of the base interpreter, outside any virtual environment."""
    return Path(getattr(sys, "_base_executable", sys.executable)).resolve()


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
