"""A reader of your own: a function of a source's `id` and `options` that yields its rows."""

from collections.abc import Iterator
from pathlib import Path

__all__ = ["questions"]


def questions(id: str, *, separator: str = "A:") -> Iterator[dict[str, str]]:  # noqa: A002 - as in params.yaml
    """Rows of a text file of blocks, each a question and, after the separator, its answer."""
    for block in Path(id).read_text(encoding="utf-8").split("\n\n"):
        question, _, answer = block.partition(separator)
        yield {"prompt": question.strip(), "response": answer.strip()}
