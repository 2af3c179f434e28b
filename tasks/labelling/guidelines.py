"""Guidelines for labellers: a Markdown file that is shown beside each question, and known by its sha256."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

from tasks.core.errors import DataError
from tasks.labelling.formats import read_text
from tasks.labelling.labels import text_error

__all__ = ["Guidelines"]

MAX_LENGTH = 100_000

HEADING_SHIFT = 2
"""The page has headings of its own, above those of the guidelines."""


@dataclass(frozen=True)
class Guidelines:
    """Their text as it is in the file, the file's sha256, and the text as HTML."""

    text: str
    sha256: str
    html: str

    @classmethod
    def read(cls, path: Path) -> Guidelines:
        """Read and render the file.

        Raises:
            DataError: it is missing, empty, longer than MAX_LENGTH characters, or no text.
        """
        text = read_text(path, exact=True)
        if not text.strip("\ufeff \r\n\t"):
            raise DataError(f"{path} is empty: --guidelines names a text that says what is better")
        if len(text) > MAX_LENGTH:
            raise DataError(f"{path} has {len(text)} characters; guidelines have at most {MAX_LENGTH}")
        if reason := text_error(str(path), text):
            raise DataError(reason)
        return cls(text, hashlib.sha256(text.encode()).hexdigest(), render(text))


def render(text: str) -> str:
    """Return Markdown as HTML; HTML within it is shown as text, pictures and links to scripts are left out."""
    markdown = MarkdownIt("js-default", {"html": False}).disable("image")
    tokens = markdown.parse(text.removeprefix("\ufeff"))
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1:]) + HEADING_SHIFT)}"
        for inner in token.children or ():
            if inner.type == "link_open":  # which leaves the question where it is
                inner.attrs |= {"target": "_blank", "rel": "noopener noreferrer"}
    return markdown.renderer.render(tokens, markdown.options, {})
