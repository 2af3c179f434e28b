"""Parts of the user's own, by name: `module:name` is what custom/<kind>/<module>.py in the project defines."""

import ast
import importlib
import sys
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from tasks.core.errors import ConfigError
from tasks.core.paths import project_root

__all__ = ["check_kind", "did_you_mean", "find_custom", "forget_custom", "load_custom"]


def find_custom(kind: str, name: str) -> ast.FunctionDef | ast.ClassDef:
    """The definition of a function or class in a module of custom/<kind>/, which is not imported.

    Raises:
        ValueError: there is none; the message names what there is.
    """
    module, _, member = name.partition(":")
    folder = project_root() / "custom" / kind
    modules = [path.stem for path in folder.glob("*.py")]
    file = f"custom/{kind}/{module}.py"
    if module not in modules:
        raise ValueError(f"{name!r}: there is no {file}; {did_you_mean(module, modules)}")
    try:
        body = ast.parse((folder / f"{module}.py").read_text(encoding="utf-8")).body
    except SyntaxError as error:
        raise ValueError(f"{file}:{error.lineno} is no Python: {error.msg}") from error
    defined = {node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    if member not in defined:
        raise ValueError(f"{name!r}: {file} defines no {member!r}; {did_you_mean(member, defined)}")
    return defined[member]


def check_kind(kind: str, name: str, known: Collection[str]) -> str:
    """The name, if it is one of those known or `find_custom` finds it; else a ValueError."""
    if ":" in name:
        find_custom(kind, name)
    elif name not in known:
        raise ValueError(f"neither a kind nor module:name of custom/{kind}; {did_you_mean(name, known)}")
    return name


def load_custom(kind: str, name: str) -> Any:
    """Import what `find_custom` finds.

    Raises:
        ConfigError: its module cannot be imported.
    """
    module, _, member = name.partition(":")
    package = sys.modules.setdefault("custom", ModuleType("custom"))
    package.__path__ = [str(project_root() / "custom")]
    try:
        return getattr(importlib.import_module(f"custom.{kind}.{module}"), member)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{name!r} cannot be imported: {problem}; see custom/{kind}/{module}.py") from error


def forget_custom() -> None:
    """Let the next stage in this process import the files as DVC hashes them, not as they were earlier."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "custom"]:
        del sys.modules[name]
    importlib.invalidate_caches()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest the closest known names for an unknown one, or list all."""
    close = get_close_matches(name, known := sorted(known))
    return f"did you mean {' or '.join(close)}?" if close else f"there is: {', '.join(known) or 'nothing'}"
