"""Lengths in tokens of prepared rows, by the base model's tokenizer alone, without torch or transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

__all__ = ["TokenCounter"]


class TokenCounter:
    """Counts tokens as the stages that train do: prompt and response apart, start and end token included.

    `context` is the longest sequence that the model can read; None where its configuration states none.
    """

    def __init__(self, model: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        length = config.get("text_config", config).get("max_position_embeddings")
        self.context: int | None = None if length is None else int(length)
        plain, whole = (self._tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
        self._start = whole.index(plain[0]) if plain and plain[0] in whole else 0

    def prompts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each prompt."""
        return [self._start + length for length in self._lengths(texts)]

    def rows(self, prompts: Sequence[str], *responses: Sequence[str]) -> list[int]:
        """Tokens of each prompt with the longest of its responses, of which there is a sequence per side."""
        longest = map(max, zip(*map(self._lengths, responses), strict=True))
        return [prompt + response + 1 for prompt, response in zip(self.prompts(prompts), longest, strict=True)]

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(item.ids) for item in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
