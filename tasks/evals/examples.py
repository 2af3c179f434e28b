"""Example responses for the report: largest gains, losses and disagreements between proxy and gold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.evals.compare import DIGITS, WIN_RATE_KEYS, REFERENCE, ScoredResponse, score_std
from tasks.evals.statistics import TIE_TOLERANCE

__all__ = ["EXAMPLES_PER_KIND", "Example", "Examples", "select_examples", "examples_to_dict"]

EXAMPLES_PER_KIND = 3
"""Number of examples per kind and policy; a reader still reads nine pairs of responses."""


@dataclass(frozen=True)
class Example:
    """Responses of a policy and the reference to one prompt; `score_difference` is what they are ranked by."""

    score_difference: float
    reference: ScoredResponse
    own: ScoredResponse


@dataclass(frozen=True)
class Examples:
    """Examples of one policy, largest difference first; a list is shorter if fewer responses qualify.

    Attributes:
        gains: above the reference by the gold judge, in its own points.
        losses: below it; `score_difference` is negative.
        disagreements: gain by the proxy less gain by the gold judge, each in standard deviations of the reference's
            scores: the proxy scores them high and the gold judge low, so they are candidates for reward hacking.
    """

    gains: tuple[Example, ...]
    losses: tuple[Example, ...]
    disagreements: tuple[Example, ...]


def select_examples(records: Sequence[ScoredResponse], count: int = EXAMPLES_PER_KIND) -> dict[str, Examples]:
    """Select the examples of each policy except the reference; ties are ordered by prompt id."""
    groups: dict[str, list[ScoredResponse]] = {}
    for record in records:
        groups.setdefault(record.policy, []).append(record)
    reference = {record.prompt_id: record for record in groups.pop(REFERENCE)}
    gold, proxy = (_standardised_gain(judge, list(reference.values())) for judge in ("gold", "proxy"))

    def gold_difference(own: ScoredResponse, other: ScoredResponse) -> float:
        return own.gold - other.gold

    def disagreement(own: ScoredResponse, other: ScoredResponse) -> float:
        return proxy(own, other) - gold(own, other)

    return {
        policy: Examples(
            gains=_top_examples(group, reference, gold_difference, count, sign=1),
            losses=_top_examples(group, reference, gold_difference, count, sign=-1),
            disagreements=_top_examples(group, reference, disagreement, count, sign=1),
        )
        for policy, group in groups.items()
    }


def examples_to_dict(examples: Examples) -> dict[str, list[dict[str, Any]]]:
    """Convert to JSON types."""
    return {kind: [_example_to_dict(example) for example in group] for kind, group in vars(examples).items()}


def _standardised_gain(judge: str, reference: Sequence[ScoredResponse]) -> Callable[[ScoredResponse, ScoredResponse], float]:
    """Gain by the judge in standard deviations of the reference's scores."""
    deviation = score_std([record.score(judge) or 0.0 for record in reference])
    return lambda own, other: ((own.score(judge) or 0.0) - (other.score(judge) or 0.0)) / deviation


def _top_examples(
    group: Sequence[ScoredResponse],
    reference: dict[str, ScoredResponse],
    value: Callable[[ScoredResponse, ScoredResponse], float],
    count: int,
    *,
    sign: int,
) -> tuple[Example, ...]:
    pairs = [(own, reference[own.prompt_id]) for own in group]
    examples = [Example(value(own, other), other, own) for own, other in pairs]
    kept = [example for example in examples if sign * example.score_difference > TIE_TOLERANCE]
    return tuple(sorted(kept, key=lambda example: (-sign * example.score_difference, example.own.prompt_id))[:count])


def _example_to_dict(example: Example) -> dict[str, Any]:
    sides = {record.policy: _response_to_dict(record) for record in (example.reference, example.own)}
    return {"prompt_id": example.own.prompt_id, "prompt": example.own.prompt, "score_difference": round(example.score_difference, DIGITS)} | sides


def _response_to_dict(record: ScoredResponse) -> dict[str, Any]:
    scores = {judge: score for judge in WIN_RATE_KEYS if (score := record.score(judge)) is not None}
    return {"response": record.display_text, "ended": record.ended, "kl": record.kl} | scores
