"""Lengths of prepared rows in tokens of the base model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tasks.core.rows import Demonstration, Preference, Rating, Row

__all__ = ["token_lengths"]


def token_lengths(model: Path, rows: Mapping[str, Iterable[Row]]) -> dict[str, dict[str, int]]:
    """Name → median, 99th percentile and maximum of its rows' lengths, as training counts them.

    Prompt and response are tokenised apart; a response counts with its end token, a pair by its longer side. Of
    demonstrations, `responses` are those without their prompt. Names without rows are left out.

    Args:
        model: folder of the base model, with its tokenizer.json.
    """
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    start = tokenizer.encode("a").special_tokens_mask.index(0)  # tokens, such as BOS, before every text

    def counts(texts: Iterable[str]) -> np.ndarray:
        return np.array(
            [len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        )

    lengths = {}
    for name, group in rows.items():
        if own := list(group):
            prompts = start + counts(getattr(row, "prompt", "") for row in own)
            sides = [1 + counts(texts) for texts in zip(*map(_responses, own), strict=True)]
            lengths[name] = prompts + np.max(sides, axis=0) if sides else prompts
            if isinstance(own[0], Demonstration):
                lengths["responses"] = sides[0]
    return {name: _summary(values) for name, values in lengths.items()}


def _responses(row: Row) -> Sequence[str]:
    if isinstance(row, Preference):
        return row.chosen, row.rejected
    if isinstance(row, Demonstration):
        return (row.response,)
    return (row.text,) if isinstance(row, Rating) else ()


def _summary(lengths: np.ndarray) -> dict[str, int]:
    shares = {"median": 0.5, "99_percent": 0.99, "longest": 1.0}
    return {name: int(np.quantile(lengths, share, method="higher")) for name, share in shares.items()}
