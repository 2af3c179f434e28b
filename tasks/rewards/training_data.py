"""Preference pairs and rated texts that a reward model is trained and evaluated on."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.core.errors import DataError
from tasks.core.rows import Preference, Rating, read_rows
from tasks.rewards.scorers import PromptResponse

if TYPE_CHECKING:
    from tasks.config.training import RewardModelParams

__all__ = ["TrainingData", "load_training_data", "pair_samples"]

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class TrainingData:
    """Rows by split: pairs for kinds that compare two texts, texts and targets for kinds that rate one.

    Attributes:
        pairs: preference pairs; a kind that rates texts has them in `test` alone, if at all.
        texts: rated texts.
        targets: one per text: its mean rating, or 1 and 0 for the two classes.
        weights: head → its weight in the score; one head has the name "".
        margin_scale: log-odds per point of a pair's margin; None: margins do not count.
        rater_ceiling: margin bucket → agreement of one rater with the mean of the others.
    """

    pairs: Mapping[str, Sequence[Preference]] = field(default_factory=dict)
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    targets: Mapping[str, Sequence[float]] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=lambda: {"": 1.0})
    margin_scale: float | None = None
    rater_ceiling: Mapping[str, float] = field(default_factory=dict)

    @property
    def objectives(self) -> list[str]:
        """Names of the heads, where there are several."""
        return [name for name in self.weights if name]

    def samples(self, split: str, limit: int | None = None) -> list[PromptResponse]:
        """Rated texts, then chosen and rejected responses of a split; of its first rows, about `limit`."""
        texts: list[PromptResponse] = [("", text) for text in self.texts.get(split, ())[:limit]]
        return texts + pair_samples(self.pairs.get(split, ())[: limit and limit // 2])

    def sizes(self) -> dict[str, float]:
        """Number of training rows."""
        if self.texts:
            return {"texts": len(self.texts["train"])}
        pairs = self.pairs["train"]
        sizes: dict[str, float] = {"pairs": len(pairs)}
        sizes |= {f"pairs/{name}": sum(row.objective == name for row in pairs) for name in self.objectives}
        if self.margin_scale is not None:
            sizes["pairs_with_margin"] = sum((row.margin or 0) > 0 for row in pairs)
            sizes["pairs_against_margin"] = sum((row.margin or 0) < 0 for row in pairs)
        return sizes


def pair_samples(pairs: Sequence[Preference]) -> list[PromptResponse]:
    """The chosen responses, then the rejected ones."""
    return [(row.prompt, row.chosen) for row in pairs] + [(row.prompt, row.rejected) for row in pairs]


def load_training_data(params: RewardModelParams, prepare: Path, preferences: Path) -> TrainingData:
    """Load the rows that the configured kind needs.

    Raises:
        DataError: they are missing, or lack a field that the kind needs.
    """
    ceiling = _read_rater_ceiling(preferences / "ceiling.csv")
    if params.pairwise:
        pairs = {split: read_rows(preferences / f"{split}.jsonl", Preference) for split in SPLITS}
        _check_pairs(params, pairs, preferences)
        scale = params.margin_scale if params.margin == "scaled" else None
        return TrainingData(pairs, weights=params.objectives or {"": 1.0}, margin_scale=scale, rater_ceiling=ceiling)
    folder, heldout = prepare / "ratings" / "proxy", preferences / "test.jsonl"
    ratings = {split: _read_ratings(folder / f"{split}.jsonl", params.kind) for split in SPLITS}
    ratings["train"] = ratings["train"][: params.max_examples]
    texts = {split: [row.text for row in rows] for split, rows in ratings.items()}
    targets = {split: [_target(row, params.threshold) for row in rows] for split, rows in ratings.items()}
    if params.threshold is not None and len(set(targets["train"])) == 1:
        raise DataError(
            f"reward_model.threshold {params.threshold:g} parts nothing: all {len(texts['train'])} texts of "
            f"{folder / 'train.jsonl'} are of one class; choose a rating between theirs"
        )
    test = read_rows(heldout, Preference) if heldout.is_file() and heldout.stat().st_size else []
    return TrainingData({"test": test}, texts, targets, rater_ceiling=ceiling)


def _target(row: Rating, threshold: float | None) -> float:
    return row.mean if threshold is None else float(row.mean >= threshold)


def _read_ratings(path: Path, kind: str) -> list[Rating]:
    try:
        return read_rows(path, Rating)
    except DataError as error:
        raise DataError(
            f"reward_model.kind {kind} learns from rated texts: {error}; let a source of collect.sources give "
            "`ratings`, or set kind to preference"
        ) from error


def _check_pairs(params: RewardModelParams, pairs: Mapping[str, Sequence[Preference]], folder: Path) -> None:
    for split, rows in pairs.items() if params.objectives else ():
        _check_objectives(rows, list(params.objectives or ()), folder / f"{split}.jsonl")
    if params.margin == "scaled" and not any((row.margin or 0) > 0 for row in pairs["train"]):
        raise DataError(
            f"reward_model.margin is scaled, but no pair of {folder / 'train.jsonl'} has a positive margin: "
            "give pairs a `margin`, or set it to none"
        )


def _check_objectives(rows: Sequence[Preference], known: Sequence[str], path: Path) -> None:
    for row in rows:
        if row.objective not in known:
            raise DataError(
                f"{path}: pair {row.id!r} is about objective {row.objective!r}; reward_model.objectives knows "
                f"{', '.join(known)}; set `objective` at its source in collect.sources"
            )
    missing = [name for name in known if not any(row.objective == name for row in rows)]
    if missing:
        raise DataError(
            f"{path} has no pair about {', '.join(missing)}: collect some, raise the number of pairs in preferences, "
            "or remove it from reward_model.objectives"
        )


def _read_rater_ceiling(path: Path) -> dict[str, float]:
    with path.open(encoding="utf-8", newline="") as file:
        return {row["bucket"]: float(row["agreement"]) for row in csv.DictReader(file) if row["agreement"]}
