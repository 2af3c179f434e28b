"""Templates, rendered so that a name that nothing defines is an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

__all__ = ["load_template"]


def load_template(
    name: str, filters: Mapping[str, Callable[..., str]], *, autoescape: bool, folder: Path = Path(__file__).parent
) -> Template:
    """A template by its file name.

    Args:
        autoescape: for HTML: what is inserted stays text.
        folder: where it lies, if not beside this file.
    """
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    return environment.get_template(name)
