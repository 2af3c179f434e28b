"""Lengths in tokens of prepared rows, by the base model's tokenizer alone, without torch or transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from tasks.core.rows import Demonstration, Preference, Prompt, Rating, Row
from tasks.core.text_stats import quantile_99

__all__ = ["TokenCounter"]


class TokenCounter:
    """Counts tokens as the stages that train do: prompt and response apart, start and end token included.

    `context` is the longest sequence that the model can read, from its card; None where that states none.
    """

    def __init__(self, model: Path, context: int | None = None) -> None:
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self.context = context
        self._start = [*self._tokenizer.encode("a").special_tokens_mask, 0].index(0)  # as in `encoding.start_ids`

    def prompts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each prompt."""
        return [self._start + length for length in self._lengths(texts)]

    def rows(self, prompts: Sequence[str], *responses: Sequence[str]) -> list[int]:
        """Tokens of each prompt with the longest of its responses, of which there is a sequence per side."""
        longest = map(max, zip(*map(self._lengths, responses), strict=True))
        return [prompt + response + 1 for prompt, response in zip(self.prompts(prompts), longest, strict=True)]

    def summary(self, rows: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, int]]:
        """Name → median, 99th percentile and maximum of its rows, all of one type; names without rows are left out."""
        found = {}
        for name, own in rows.items():
            if lengths := sorted(self._by_type(own)):
                median = lengths[(len(lengths) - 1) // 2]
                found[name] = {"median": median, "99_percent": quantile_99(lengths), "max": lengths[-1]}
        return found

    def _by_type(self, rows: Sequence[Row]) -> list[int]:
        texts = [row for row in rows if isinstance(row, Rating)]
        shown = [row for row in rows if isinstance(row, Demonstration)]
        pairs = [row for row in rows if isinstance(row, Preference)]
        return [
            *self.prompts([row.prompt for row in rows if isinstance(row, Prompt)]),
            *self.rows([""] * len(texts), [row.text for row in texts]),
            *self.rows([row.prompt for row in shown], [row.response for row in shown]),
            *self.rows([row.prompt for row in pairs], [row.chosen for row in pairs], [row.rejected for row in pairs]),
        ]

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(item.ids) for item in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
