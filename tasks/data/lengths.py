"""Lengths of prepared rows in tokens of the base model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tasks.core.rows import Demonstration, Preference, Rating, Row

__all__ = ["count_tokens", "token_lengths"]


def token_lengths(model: Path, rows: Mapping[str, Iterable[Row]]) -> dict[str, dict[str, int]]:
    """Name → median, 99th percentile and maximum of its rows' lengths, as `count_tokens` counts them.

    Of demonstrations, `responses` are those without their prompt. Names without rows are left out.

    Args:
        model: folder of the base model, with its tokenizer.json.
    """
    lengths = {}
    for name, group in rows.items():
        if own := list(group):
            lengths[name] = count_tokens(model, own)
            if isinstance(own[0], Demonstration):
                lengths["responses"] = count_tokens(model, own, responses_only=True)
    return {name: _summary(values) for name, values in lengths.items()}


def count_tokens(model: Path, rows: Sequence[Row], *, responses_only: bool = False) -> np.ndarray:
    """Lengths [N] of rows of one type as training counts them, start and end tokens included.

    Prompt and response are tokenised apart; of a pair the longer side counts.
    """
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    start = tokenizer.encode("a").special_tokens_mask.index(0)  # tokens, such as BOS, before every text

    def counts(texts: Iterable[str]) -> np.ndarray:
        return np.array(
            [len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        )

    sides = [1 + counts(texts) for texts in zip(*map(_responses, rows), strict=True)]
    responses = np.max(sides, axis=0) if sides else np.zeros(len(rows), dtype=int)
    prompts = start + counts(getattr(row, "prompt", "") for row in rows)
    return responses if responses_only else prompts + responses


def _responses(row: Row) -> Sequence[str]:
    if isinstance(row, Preference):
        return row.chosen, row.rejected
    if isinstance(row, Demonstration):
        return (row.response,)
    return (row.text,) if isinstance(row, Rating) else ()


def _summary(lengths: np.ndarray) -> dict[str, int]:
    shares = {"median": 0.5, "99_percent": 0.99, "longest": 1.0}
    return {name: int(np.quantile(lengths, share, method="higher")) for name, share in shares.items()}
