"""Command line of a sandboxed Python: bubblewrap with only Python and its libraries mounted."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from tasks.core.errors import ConfigError
from tasks.rewards.sandbox import inside
from tasks.rewards.sandbox.seccomp import seccomp_program

if TYPE_CHECKING:
    from tasks.config.rules import CodeRule

__all__ = ["ENVIRONMENT", "SCRATCH", "command"]

SCRATCH = "/scratch"

# Equal hashes in every run make the order of a program's sets deterministic.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}

_PACKAGE_DIR = "/ours"
_NOBODY_UID = "65534"
_SYSTEM, _PYTHON = "/usr", Path("/python")
_BOOTSTRAP = "import sys; sys.path.insert(0, sys.argv[1]); from {module} import main; main()"


def command(module: ModuleType, options: CodeRule, *arguments: str) -> list[str]:
    """Command that starts a module of `inside` under the limits and the isolation of the options."""
    isolated = options.isolation == "bubblewrap"
    limits = (
        options.cpu_seconds, options.memory_mb << 20, options.scratch_mb << 20, options.answer_kb << 10,
    )  # fmt: skip
    # No site (-S, -s), no folder of the caller's on the path (-P), no byte code written (-B).
    python = [
        _sandbox_path(_interpreter()) if isolated else str(_interpreter()),
        "-S",
        "-s",
        "-P",
        "-B",
        "-c",
        _BOOTSTRAP.format(module=module.__name__),
    ]
    package_root = _PACKAGE_DIR if isolated else str(Path(inside.__file__).parents[4])
    instructions = seccomp_program().hex() if isolated else ""
    return [
        *(_bwrap_args(options.scratch_mb << 20) if isolated else ()),
        *python,
        package_root,
        *map(str, limits),
        instructions,
        *arguments,
    ]


def _bwrap_args(scratch: int) -> list[str]:
    """Arguments of bubblewrap; the process is PID 1 of its namespace, so its end kills all others in it."""
    arguments = [
        _find_bwrap(), "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--as-pid-1",
        "--cap-drop", "ALL", "--uid", _NOBODY_UID, "--gid", _NOBODY_UID, "--hostname", "sandbox", "--clearenv",
    ]  # fmt: skip
    for name, value in _environment().items():
        arguments += ["--setenv", name, value]
    for kind, *paths in _mounts():
        arguments += [kind, *paths]
    package = Path(inside.__file__).parent
    arguments += ["--ro-bind", str(package), f"{_PACKAGE_DIR}/tasks/rewards/sandbox/inside"]
    arguments += ["--dev-bind", "/dev/null", "/dev/null"]
    arguments += ["--size", str(scratch), "--tmpfs", SCRATCH, "--chdir", SCRATCH, "--remount-ro", "/"]
    return arguments


def _environment() -> dict[str, str]:
    """Environment variables; the linker needs the library path of a Python outside /usr."""
    library_path = {} if sys.base_prefix == _SYSTEM else {"LD_LIBRARY_PATH": f"{_PYTHON}/lib"}
    return {**ENVIRONMENT, "HOME": SCRATCH, "TMPDIR": SCRATCH, **library_path}


@lru_cache(maxsize=1)
def _mounts() -> tuple[tuple[str, ...], ...]:
    """Python's executable, its standard library without installed packages, and the system's libraries; no `/etc`."""
    prefix = Path(sys.base_prefix).resolve()
    mounts = [_bind_or_symlink(path) for path in (Path("/usr/lib"), Path("/usr/lib64"), Path("/lib"), Path("/lib64"))]
    for folder in (prefix / "lib", prefix / "lib64"):
        if folder.is_dir() and str(prefix) != _SYSTEM:
            mounts.append(("--ro-bind", str(folder), _sandbox_path(folder)))
    for packages in {sysconfig.get_path(name, vars=_base_paths()) for name in ("purelib", "platlib")}:
        if Path(packages).is_dir():
            path = _sandbox_path(Path(packages))
            mounts += [("--tmpfs", path), ("--remount-ro", path)]
    mounts.append(("--ro-bind", str(_interpreter()), _sandbox_path(_interpreter())))
    return tuple(mounts)


def _bind_or_symlink(path: Path) -> tuple[str, ...]:
    if path.is_symlink():
        return ("--symlink", str(path.readlink()), str(path))
    return ("--ro-bind-try", str(path), str(path))


def _sandbox_path(path: Path) -> str:
    """Path inside the sandbox of a file of Python's; it does not reveal the home folder."""
    prefix = Path(sys.base_prefix).resolve()
    if str(prefix) == _SYSTEM:
        return str(path)
    return str(_PYTHON / path.resolve().relative_to(prefix))


def _base_paths() -> dict[str, str]:
    """Installation paths of the base interpreter, outside any virtual environment."""
    return {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}


@lru_cache(maxsize=1)
def _interpreter() -> Path:
    """Executable of the base interpreter, outside any virtual environment."""
    return Path(getattr(sys, "_base_executable", sys.executable)).resolve()


def _find_bwrap() -> str:
    found = shutil.which("bwrap")
    if found is None:
        raise ConfigError(
            "programs that a policy wrote run behind bubblewrap, and there is no `bwrap` on PATH: install it "
            "(`apt-get install bubblewrap`; Linux only), or set isolation: unsafe_no_isolation, under which a "
            "program can read and delete what you can"
        )
    return found
