"""What the commands of `rlhf` have in common."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from flows import screen
from tasks.core.errors import ConfigError
from tasks.core.paths import project_root

__all__ = ["enter", "enter_served", "interruptible"]


def enter() -> Path:
    """Go to the project's root, because DVC names stages relative to where one stands.

    Raises:
        ConfigError: there is no project here, or this code belongs to another one.
    """
    root = project_root()
    installed = Path(__file__).resolve().parents[1]
    if installed != root:
        raise ConfigError(
            f"this is the rlhf command of {installed}, but the project here is {root}: use `python -m flows.cli` here, "
            "or install the package here"
        )
    os.chdir(root)
    return root


def enter_served() -> Path:
    """As `enter`, and report to what `rlhf up` has started, if it is up."""
    root = enter()
    from flows import services

    services.use()
    return root


@contextmanager
def interruptible(comfort: str) -> Iterator[None]:
    """Ctrl-C is one message and the shell's exit status for it."""
    try:
        yield
    except KeyboardInterrupt:
        screen.errors.print(f"[yellow]interrupted.[/] Run again: {comfort}.")
        raise typer.Exit(130) from None
