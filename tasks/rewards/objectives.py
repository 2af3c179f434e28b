"""Training objectives of reward models: data, trainer and evaluation of each kind.

An objective holds the rows, makes the trainer, and evaluates raw values [N, K] of the heads on held-out texts.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Trainer, TrainerCallback

from tasks.core.errors import DataError
from tasks.core.rows import Preference, Rating, read_rows, write_table
from tasks.rewards.metrics import (
    MARGIN_BUCKETS,
    accuracy_by_margin,
    area_under_curve,
    calibration_table,
    classification_metrics,
    correlation,
    rank_correlation,
    rating_metrics,
)
from tasks.rewards.training import pair_trainer, regression_trainer

if TYPE_CHECKING:
    from tasks.config.training import RewardModelParams

__all__ = ["Objective", "PreferenceObjective", "PromptResponse", "RatingObjective", "load_objective"]

SPLITS = ("train", "validation", "test")

ACCURACY_COLUMNS = ("bucket", "pairs", "accuracy", "ceiling")
CALIBRATION_COLUMNS = ("predicted", "observed", "count")

PromptResponse = tuple[str, str]
"""A prompt, empty where texts are whole, and a response."""


class Objective(Protocol):
    """What a kind of reward model learns from."""

    weights: Mapping[str, float]
    """Head → its weight in the score; one head has the name ""."""

    def dataset_sizes(self) -> dict[str, float]:
        """Number of training rows."""

    def texts(self, split: str, limit: int | None = None) -> list[PromptResponse]:
        """Texts of a split, or about `limit` texts of its first rows."""

    def trainer(self, model: PeftModel, tokenizer: Any, *, seed: int, callbacks: list[TrainerCallback]) -> Trainer:
        """Trainer of the model on the training rows."""

    def evaluate(self, values: Tensor, out: Path) -> dict[str, float]:
        """Metrics of raw values [N, K] of `texts("test")`; writes the two tables, empty where they do not apply."""

    def headline_metric(self, normalised: Tensor) -> tuple[str, float]:
        """Name and value of the metric that compares members of an ensemble, on normalised values."""


def load_objective(params: RewardModelParams, prepare: Path, preferences: Path) -> Objective:
    """Load the objective of the configured kind.

    Raises:
        DataError: the rows that this kind needs are missing, or lack a field that it needs.
    """
    if params.pairwise:
        return PreferenceObjective(params, preferences)
    return RatingObjective(params, prepare / "ratings" / "proxy", preferences)


class PreferenceObjective:
    """Preference pairs, for one head or for one head per objective."""

    def __init__(self, params: RewardModelParams, preferences: Path) -> None:
        """Read the pairs of stage preferences.

        Raises:
            DataError: there are none, a pair names no known objective, or no pair has a positive margin.
        """
        self.weights: Mapping[str, float] = params.objectives or {"": 1.0}
        self._params, self._rater_ceiling = params, _read_rater_ceiling(preferences)
        self._rows = {split: read_rows(preferences / f"{split}.jsonl", Preference) for split in SPLITS}
        self._objectives = list(params.objectives or ())
        if self._objectives:
            for split, rows in self._rows.items():
                _check_objectives(rows, self._objectives, preferences / f"{split}.jsonl")
        if params.margin == "scaled" and not any((row.margin or 0) > 0 for row in self._rows["train"]):
            raise DataError(
                f"reward_model.margin is scaled, but no pair of {preferences / 'train.jsonl'} has a positive margin: "
                "give pairs a `margin`, or set it to none"
            )

    def dataset_sizes(self) -> dict[str, float]:
        rows = self._rows["train"]
        sizes: dict[str, float] = {"pairs": len(rows)}
        sizes |= {f"pairs/{name}": sum(row.objective == name for row in rows) for name in self._objectives}
        if self._params.margin == "scaled":
            sizes["pairs_with_margin"] = sum((row.margin or 0) > 0 for row in rows)
            sizes["pairs_against_margin"] = sum((row.margin or 0) < 0 for row in rows)
        return sizes

    def texts(self, split: str, limit: int | None = None) -> list[PromptResponse]:
        return _pair_texts(self._rows[split][: limit and limit // 2])

    def trainer(self, model: PeftModel, tokenizer: Any, *, seed: int, callbacks: list[TrainerCallback]) -> Trainer:
        scale = self._params.margin_scale if self._params.margin == "scaled" else None
        return pair_trainer(
            self._params, model, tokenizer, self._rows["train"], seed=seed, callbacks=callbacks,
            margin_scale=scale, objectives=self._objectives,
        )  # fmt: skip

    def evaluate(self, values: Tensor, out: Path) -> dict[str, float]:
        rows, differences = self._rows["test"], self._score_differences(values)
        metrics = _pair_metrics(differences, rows, self._rater_ceiling, out)
        table, calibration_error = calibration_table(differences)
        write_table(out / "calibration.csv", table, CALIBRATION_COLUMNS)
        for name in self._objectives:
            mask = torch.tensor([row.objective == name for row in rows])
            metrics[f"accuracy/{name}"] = _fraction_true(differences[mask] > 0)
        return metrics | {"calibration_error": calibration_error}

    def headline_metric(self, normalised: Tensor) -> tuple[str, float]:
        return "accuracy", _fraction_true(self._score_differences(normalised) > 0)

    def _score_differences(self, values: Tensor) -> Tensor:
        """Score differences, chosen − rejected [pairs], of the head of each pair's objective."""
        rows = self._rows["test"]
        heads = [self._objectives.index(str(row.objective)) if self._objectives else 0 for row in rows]
        positions = torch.arange(len(rows))
        return values[positions, heads] - values[positions + len(rows), heads]


class RatingObjective:
    """Rated texts: their mean ratings, or whether these reach a threshold. Pairs, where there are any, only measure."""

    weights: Mapping[str, float] = {"": 1.0}

    def __init__(self, params: RewardModelParams, ratings: Path, preferences: Path) -> None:
        """Read the rated texts that the pipeline may see, and the held-out pairs.

        Raises:
            DataError: there are no rated texts, or all training texts are of one class.
        """
        self._params, self._threshold, self._rater_ceiling = params, params.threshold, _read_rater_ceiling(preferences)
        self._rows = {split: _read_ratings(ratings / f"{split}.jsonl", params.kind) for split in SPLITS}
        self._rows["train"] = self._rows["train"][: params.max_examples]
        pairs = preferences / "test.jsonl"
        self._pairs = read_rows(pairs, Preference) if pairs.is_file() and pairs.stat().st_size else []
        positive_share = sum(self._targets("train")) / len(self._rows["train"])
        if self._threshold is not None and positive_share in (0, 1):
            raise DataError(
                f"reward_model.threshold {self._threshold:g} parts nothing: all {len(self._rows['train'])} texts of "
                f"{ratings / 'train.jsonl'} are of one class; choose a rating between theirs"
            )

    def dataset_sizes(self) -> dict[str, float]:
        return {"texts": len(self._rows["train"])}

    def texts(self, split: str, limit: int | None = None) -> list[PromptResponse]:
        rated_texts = [("", row.text) for row in self._rows[split][:limit]]
        return rated_texts + _pair_texts(self._pairs) if split == "test" else rated_texts

    def trainer(self, model: PeftModel, tokenizer: Any, *, seed: int, callbacks: list[TrainerCallback]) -> Trainer:
        return regression_trainer(
            self._params, model, tokenizer, [row.text for row in self._rows["train"]], self._targets("train"),
            seed=seed, callbacks=callbacks, binary=self._threshold is not None,
        )  # fmt: skip

    def evaluate(self, values: Tensor, out: Path) -> dict[str, float]:
        targets = torch.tensor(self._targets("test"))
        scores, pair_scores = values[: len(targets), 0], values[len(targets) :, 0]
        metrics = _pair_metrics(
            pair_scores[: len(self._pairs)] - pair_scores[len(self._pairs) :], self._pairs, self._rater_ceiling, out
        )
        if self._threshold is None:
            write_table(out / "calibration.csv", [], CALIBRATION_COLUMNS)
            metrics |= rating_metrics(scores, targets)
            return metrics | {"heldout_rank_correlation": rank_correlation(scores, targets)}
        # The log-odds signed by class is to a text what the score difference is to a pair.
        table, calibration_error = calibration_table(torch.where(targets > 0, scores, -scores))
        write_table(out / "calibration.csv", table, CALIBRATION_COLUMNS)
        return metrics | classification_metrics(scores, targets) | {"calibration_error": calibration_error}

    def headline_metric(self, normalised: Tensor) -> tuple[str, float]:
        targets = torch.tensor(self._targets("test"))
        scores = normalised[: len(targets), 0]
        if self._threshold is None:
            return "correlation", correlation(scores, targets)
        return "auc", area_under_curve(scores, targets)

    def _targets(self, split: str) -> list[float]:
        means = [row.mean for row in self._rows[split]]
        return means if self._threshold is None else [float(mean >= self._threshold) for mean in means]


def _read_ratings(path: Path, kind: str) -> list[Rating]:
    try:
        return read_rows(path, Rating)
    except DataError as error:
        raise DataError(
            f"reward_model.kind {kind} learns from rated texts: {error}; let a source of collect.sources give "
            "`ratings`, or set kind to preference"
        ) from error


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
            "or "
            "remove it from reward_model.objectives"
        )


def _pair_texts(pairs: Sequence[Preference]) -> list[PromptResponse]:
    """The chosen texts, then the rejected ones."""
    return [(row.prompt, row.chosen) for row in pairs] + [(row.prompt, row.rejected) for row in pairs]


def _pair_metrics(
    differences: Tensor, pairs: Sequence[Preference], ceiling: Mapping[str, float], out: Path
) -> dict[str, float]:
    """Accuracy on held-out human pairs by rating margin, with the rater ceiling; without pairs the table is empty."""
    margins = torch.tensor([float("nan") if row.margin is None else row.margin for row in pairs])
    table = accuracy_by_margin(differences, margins, ceiling) if pairs else []
    write_table(out / "accuracy_by_margin.csv", table, ACCURACY_COLUMNS)
    clear = margins.abs() >= MARGIN_BUCKETS.clear_margin
    return {
        "heldout_pairs": len(pairs),
        "accuracy": _fraction_true(differences > 0),
        "accuracy_margin_1": _fraction_true(differences[clear] > 0),
        "pairs_margin_1": int(clear.sum()),
    }


def _fraction_true(hits: Tensor) -> float:
    return hits.float().mean().item() if hits.numel() else 0.0


def _read_rater_ceiling(preferences: Path) -> dict[str, float]:
    """Margin bucket → agreement of one rater with the mean of the others."""
    path = preferences / "ceiling.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return {row["bucket"]: float(row["agreement"]) for row in csv.DictReader(file) if row["agreement"]}
