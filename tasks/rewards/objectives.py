"""Kinds of reward models: the held-out metrics of each."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tasks.core.rows import write_table
from tasks.rewards.metrics import (
    accuracy_by_margin,
    calibration_table,
    check_above_chance,
    classification_metrics,
    fraction_true,
    pair_metrics,
    rank_correlation,
    rating_metrics,
)
from tasks.rewards.reward_model import EnsembleMember
from tasks.rewards.training import TrainingData

__all__ = ["OBJECTIVES", "Objective", "check_accuracy", "ensemble_metrics", "evaluate_reward_model"]

Evaluation = tuple[dict[str, float], list[dict[str, Any]]]
"""Metrics, and the rows of the calibration table; none for a kind that states no probability."""


class Objective(NamedTuple):
    """One kind of reward model."""

    metrics: Callable[[TrainingData, Tensor], Evaluation]  # of the values [N, K] of `data.samples("test")`
    headline: str  # the metric that compares an ensemble with its members


def _evaluate_preferences(data: TrainingData, values: Tensor) -> Evaluation:
    """Accuracy of each objective, and calibration of the probability that the chosen response is preferred."""
    differences = _score_differences(data, values)
    table, error = calibration_table(differences)
    rows = {name: [row.objective == name for row in data.pairs["test"]] for name in data.objectives}
    metrics = {f"accuracy/{name}": fraction_true(differences[own] > 0) for name, own in rows.items()}
    return metrics | {"calibration_error": error}, table


def _evaluate_ratings(data: TrainingData, values: Tensor) -> Evaluation:
    scores, targets = _rated(data, values)
    return rating_metrics(scores, targets) | {"heldout_rank_correlation": rank_correlation(scores, targets)}, []


def _evaluate_classes(data: TrainingData, values: Tensor) -> Evaluation:
    scores, targets = _rated(data, values)
    # The log-odds signed by class is to a text what the score difference is to a pair.
    table, error = calibration_table(torch.where(targets > 0, scores, -scores))
    return classification_metrics(scores, targets) | {"calibration_error": error}, table


def _rated(data: TrainingData, values: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and targets of the held-out texts, [texts] each."""
    targets = torch.tensor(data.targets["test"])
    return values[: len(targets), 0], targets


_PREFERENCES = Objective(_evaluate_preferences, "accuracy")

OBJECTIVES: Mapping[str, Objective] = {
    "preference": _PREFERENCES,
    "multi_objective": _PREFERENCES,
    "rating": Objective(_evaluate_ratings, "heldout_correlation"),
    "classification": Objective(_evaluate_classes, "heldout_auc"),
}
"""`reward_model.kind` → objective."""


def evaluate_reward_model(
    kind: str, data: TrainingData, member: EnsembleMember, values: Tensor, out: Path
) -> dict[str, float]:
    """Metrics of raw values [N, K] of `data.samples("test")`; writes accuracy_by_margin.csv and calibration.csv."""
    metrics, calibration = _evaluate(kind, data, values)
    by_margin = accuracy_by_margin(_score_differences(data, values), _margins(data), data.rater_ceiling)
    write_table(out / "accuracy_by_margin.csv", by_margin, ("bucket", "pairs", "accuracy", "ceiling"))
    write_table(out / "calibration.csv", calibration, ("predicted", "observed", "count"))
    return member.normalisation_metrics() | metrics | member.length_bias(data.samples("test"), values)


def check_accuracy(data: TrainingData, scores: Tensor, min_accuracy: float) -> None:
    """Check scores [N, K] of `data.samples("test")` against chance; rated texts are compared two by two."""
    if not data.targets:
        check_above_chance(_score_differences(data, scores), min_accuracy)
        return
    ratings, targets = _rated(data, scores)
    even = len(targets) // 2 * 2
    gaps = targets[0:even:2] - targets[1:even:2]
    differences = (ratings[0:even:2] - ratings[1:even:2]) * gaps.sign()
    check_above_chance(differences[gaps != 0], min_accuracy)


def ensemble_metrics(kind: str, data: TrainingData, scores: Tensor) -> dict[str, float]:
    """Headline metric of the mean over the members, and its mean over them [members, N, K]; empty for one member."""
    if len(scores) == 1:
        return {}
    headline = OBJECTIVES[kind].headline
    ensemble, *single = (_evaluate(kind, data, values)[0][headline] for values in (scores.mean(0), *scores))
    name = headline.removeprefix("heldout_")
    return {"members": len(scores), f"ensemble_{name}": ensemble, f"mean_member_{name}": sum(single) / len(single)}


def _evaluate(kind: str, data: TrainingData, values: Tensor) -> Evaluation:
    metrics, calibration = OBJECTIVES[kind].metrics(data, values)
    return pair_metrics(_score_differences(data, values), _margins(data)) | metrics, calibration


def _score_differences(data: TrainingData, values: Tensor) -> Tensor:
    """Score differences, chosen − rejected [pairs], of the head of each pair's objective."""
    pairs, pair_values = data.pairs["test"], values[len(data.targets.get("test", ())) :]
    heads = [data.objectives.index(str(row.objective)) if data.objectives else 0 for row in pairs]
    rows = torch.arange(len(pairs))
    return pair_values[rows, heads] - pair_values[rows + len(pairs), heads]


def _margins(data: TrainingData) -> Tensor:
    """Margins of the held-out pairs in points of the rating scale, NaN where unknown."""
    return torch.tensor([float("nan") if row.margin is None else row.margin for row in data.pairs["test"]])
