"""The responses that say most: where a policy gained and lost most, and where the judges part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.evals.compare import DIGITS, JUDGES, REFERENCE, Judged, spread
from tasks.evals.statistics import TIE

__all__ = ["EXAMPLES", "Example", "Examples", "choose", "plain"]

EXAMPLES = 3
"""Of each kind for each policy: nine pairs of responses are what a reader still reads."""


@dataclass(frozen=True)
class Example:
    """A policy's response beside the reference's to the same prompt; `by` is what they were chosen for."""

    by: float
    reference: Judged
    own: Judged


@dataclass(frozen=True)
class Examples:
    """Of one policy, the most telling first; a list is shorter where fewer responses are of its kind.

    Attributes:
        gains: above the reference by the gold judge, in its own points.
        losses: below it; `by` is negative.
        disagreements: gain by the proxy less gain by the gold judge, each in standard deviations of the reference's
            scores: the proxy is pleased and the gold judge is not, so these are the candidates for reward hacking.
    """

    gains: tuple[Example, ...]
    losses: tuple[Example, ...]
    disagreements: tuple[Example, ...]


def choose(records: Sequence[Judged], count: int = EXAMPLES) -> dict[str, Examples]:
    """Policy → its examples, without the reference; equal ones in the order of their prompts' names."""
    groups: dict[str, list[Judged]] = {}
    for record in records:
        groups.setdefault(record.policy, []).append(record)
    reference = {record.prompt_id: record for record in groups.pop(REFERENCE)}
    gold, proxy = (_gain(judge, list(reference.values())) for judge in ("gold", "proxy"))

    def own_points(own: Judged, other: Judged) -> float:
        return own.gold - other.gold

    def disagreement(own: Judged, other: Judged) -> float:
        return proxy(own, other) - gold(own, other)

    return {
        policy: Examples(
            gains=_top(group, reference, own_points, count, sign=1),
            losses=_top(group, reference, own_points, count, sign=-1),
            disagreements=_top(group, reference, disagreement, count, sign=1),
        )
        for policy, group in groups.items()
    }


def plain(examples: Examples) -> dict[str, list[dict[str, Any]]]:
    """As JSON can say it."""
    return {kind: [_plain(example) for example in group] for kind, group in vars(examples).items()}


def _gain(judge: str, reference: Sequence[Judged]) -> Callable[[Judged, Judged], float]:
    """By the judge, in standard deviations of the reference's scores."""
    deviation = spread([record.score(judge) or 0.0 for record in reference])
    return lambda own, other: ((own.score(judge) or 0.0) - (other.score(judge) or 0.0)) / deviation


def _top(
    group: Sequence[Judged],
    reference: dict[str, Judged],
    value: Callable[[Judged, Judged], float],
    count: int,
    *,
    sign: int,
) -> tuple[Example, ...]:
    pairs = [(own, reference[own.prompt_id]) for own in group]
    examples = [Example(value(own, other), other, own) for own, other in pairs]
    kept = [example for example in examples if sign * example.by > TIE]
    return tuple(sorted(kept, key=lambda example: (-sign * example.by, example.own.prompt_id))[:count])


def _plain(example: Example) -> dict[str, Any]:
    sides = {record.policy: _response(record) for record in (example.reference, example.own)}
    return {"prompt_id": example.own.prompt_id, "prompt": example.own.prompt, "by": round(example.by, DIGITS)} | sides


def _response(record: Judged) -> dict[str, Any]:
    scores = {judge: score for judge in JUDGES if (score := record.score(judge)) is not None}
    return {"response": record.shown, "ended": record.ended, "kl": record.kl} | scores
