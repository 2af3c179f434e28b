"""How long responses are; how varied they are is in tasks.core.words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tasks.core.words import tokenize_words

__all__ = ["length_counts", "word_count"]


def word_count(text: str) -> int:
    """Words in the text; punctuation is none."""
    return len(tokenize_words(text))


def length_counts(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(length, how many) for each length from the shortest to the longest, empty ones in between included."""
    if not lengths:
        return []
    counts = Counter(lengths)
    return [(length, counts[length]) for length in range(min(lengths), max(lengths) + 1)]
