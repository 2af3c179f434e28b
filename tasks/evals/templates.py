"""Jinja templates that fail on a missing name; apart from the report, so that others need not import its figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

__all__ = ["load_template"]


def load_template(
    name: str, filters: Mapping[str, Callable[..., str]], *, autoescape: bool, folder: Path = Path(__file__).parent
) -> Template:
    """Load a template by its file name.

    Args:
        autoescape: escape inserted text, for HTML.
        folder: folder of the template, by default that of this file.
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
