"""Lengths of responses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tasks.core.words import tokenize_words

__all__ = ["length_counts", "word_count"]


def word_count(text: str) -> int:
    """Count the words of the text, without punctuation."""
    return len(tokenize_words(text))


def length_counts(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Count responses per length, from the shortest to the longest, zeros included."""
    if not lengths:
        return []
    counts = Counter(lengths)
    return [(length, counts[length]) for length in range(min(lengths), max(lengths) + 1)]
