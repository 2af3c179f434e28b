"""What stage prepare wrote, as the stages after it will read it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tasks.core.rows import SPLITS, Demonstration, Preference, Prompt, Rating, RowT, Split, read_rows
from tasks.data.cleaning import hash_uniform, split_keys

if TYPE_CHECKING:
    from tasks.config.params import Params

__all__ = ["PreparedRows"]

GOLD_PAIR_SHARE = 0.3  # of the pairs, for the gold judge, where nothing but pairs can judge

Judge = Literal["model of ratings", "model of pairs", "other", "none"]


class PreparedRows:
    """Rows that prepare wrote; a file that is missing or empty holds none.

    `pairs` and `gold_pairs` are those after the gold judge's share is set as `judge` needs it.
    """

    def __init__(self, params: Params, folder: Path) -> None:
        self._params, self._folder = params, folder

    def read(self, name: str, split: Split, row_type: type[RowT]) -> list[RowT]:
        """Read the rows of a split."""
        path = self._folder / name / f"{split}.jsonl"
        return read_rows(path, row_type) if path.is_file() and path.stat().st_size else []

    def ratings(self, half: str, split: Split) -> list[Rating]:
        """Rated texts of the proxy or the gold half."""
        return self.read(f"ratings/{half}", split, Rating)

    @cached_property
    def _all_pairs(self) -> dict[Split, list[tuple[float, Preference]]]:
        """Pairs of the sources, each with the share of the gold judge from which on it is that judge's."""
        rows = {
            split: [*self.read("preferences", split, Preference), *self.read("preferences/gold", split, Preference)]
            for split in SPLITS
        }
        split_key = split_keys(row for own in rows.values() for row in own)
        return {
            split: [(hash_uniform(split_key(row), self._params.seed, "half"), row) for row in own]
            for split, own in rows.items()
        }

    def pairs(self, split: Split) -> list[Preference]:
        """Pairs that are left for training."""
        return [row for place, row in self._all_pairs[split] if place >= self.gold_share]

    def gold_pairs(self, split: Split) -> list[Preference]:
        """Pairs of the gold judge."""
        return [row for place, row in self._all_pairs[split] if place < self.gold_share]

    def demonstrations(self, split: Split) -> list[Demonstration]:
        """Demonstrations; those that are chosen sides of pairs are there as long as the pairs are not the judge's."""
        gold = {row.id for row in self.gold_pairs(split)}
        return [row for row in self.read("demonstrations", split, Demonstration) if row.id not in gold]

    @cached_property
    def has_ratings(self) -> bool:
        """Whether the gold judge can learn from ratings."""
        return all(self.ratings("gold", split) for split in ("train", "test"))

    @cached_property
    def prompts(self) -> dict[Split, list[Prompt]]:
        """Prompts by split."""
        return {split: self.read("prompts", split, Prompt) for split in SPLITS}

    @cached_property
    def judge(self) -> Judge:
        """What can judge the policies: what params.yaml says if that works, else what does work."""
        params, answered = self._params, all(row.answer is not None for row in self.prompts["test"])
        kind = params.gold_judge.kind if params.gold_judge else None
        unnecessary = params.environment is not None or params.evaluate.gold_rule is not None or answered
        if kind == "rating" and self.has_ratings:
            return "model of ratings"
        if kind == "preference" and any(self._all_pairs.values()):
            return "model of pairs"
        if unnecessary:
            return "other"
        if any(self._all_pairs.values()):
            return "model of pairs"
        return "model of ratings" if self.has_ratings else "none"

    @cached_property
    def gold_share(self) -> float:
        """Share of pairs for the gold judge."""
        return self._params.prepare.gold_pair_share or (GOLD_PAIR_SHARE if self.judge == "model of pairs" else 0.0)
