"""Checks of custom rules: functions in tasks/rewards/custom that params.yaml names as `module:function`."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

__all__ = ["CUSTOM_DIR", "check_custom_rule", "did_you_mean"]

CUSTOM_DIR = Path(__file__).resolve().parents[1] / "rewards" / "custom"
"""Folder of custom reward modules; a dep of every stage that scores."""

SAMPLE_ARGS = 3
"""Number of arguments that every function has: prompt, response, answer."""


def check_custom_rule(function: str, options: Mapping[str, object]) -> None:
    """Check that `module:function` exists and accepts these options.

    Raises:
        ValueError: it does not; the message names what there is.
    """
    module, _, name = function.partition(":")
    modules = sorted(path.stem for path in CUSTOM_DIR.glob("*.py") if path.stem != "__init__")
    if module not in modules:
        raise ValueError(
            f"function {function!r}: there is no tasks/rewards/custom/{module}.py; {did_you_mean(module, modules)}"
        )
    functions = _functions(CUSTOM_DIR / f"{module}.py")
    if name not in functions:
        raise ValueError(
            f"function {function!r}: tasks/rewards/custom/{module}.py defines no {name!r}; "
            f"{did_you_mean(name, [*functions])}"
        )
    _check_arguments(function, functions[name].args, options)


def _functions(path: Path) -> dict[str, ast.FunctionDef]:
    """The functions that the file defines by `def`."""
    try:
        body = ast.parse(path.read_text(encoding="utf-8"), str(path)).body
    except SyntaxError as error:
        raise ValueError(f"tasks/rewards/custom/{path.name}:{error.lineno} is no Python: {error.msg}") from error
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def _check_arguments(function: str, arguments: ast.arguments, options: Mapping[str, object]) -> None:
    names = [item.arg for item in [*arguments.posonlyargs, *arguments.args]]
    if len(names) < SAMPLE_ARGS:
        raise ValueError(f"function {function!r} must take (prompt, response, answer, …), it takes {tuple(names)}")
    defaults = [None] * (len(names) - len(arguments.defaults)) + list(arguments.defaults)
    known = dict(zip(names[SAMPLE_ARGS:], defaults[SAMPLE_ARGS:], strict=True))
    known |= {item.arg: default for item, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)}
    if arguments.kwarg is None and (unknown := [name for name in options if name not in known]):
        raise ValueError(f"function {function!r} takes no option {unknown[0]!r}; {did_you_mean(unknown[0], [*known])}")
    if missing := [name for name, default in known.items() if default is None and name not in options]:
        raise ValueError(f"function {function!r} needs the option {missing[0]!r}; add it beside `function`")


def did_you_mean(name: str, known: list[str]) -> str:
    """Suggest the closest known names for an unknown one, or list all."""
    close = get_close_matches(name, known)
    return f"did you mean {' or '.join(close)}?" if close else f"there is: {', '.join(sorted(known)) or 'nothing'}"
