"""Non-inferiority tests of a policy against the champion: one per metric, paired by prompt.

For each metric the whole 95 % interval of the paired difference must lie on the good side of its margin, which tests
non-inferiority at level 0.025 (Piaggio et al. 2012, JAMA 308:2594). A policy passes only if it does so in every metric.
That is an intersection–union test, whose level is that of its single tests (Berger 1982, Technometrics 24:295), so
nothing has to be corrected for their number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tasks.core.origin import Finding
from tasks.core.words import repetition_rate
from tasks.evals.statistics import Interval, bootstrap_mean, pairwise_wins

__all__ = ["METRICS", "MetricSpec", "ResponseScores", "paired_interval", "noninferiority_rule"]


class ResponseScores(Protocol):
    """Fields of a response that metrics need, as in `tasks.evals.compare.ScoredResponse`."""

    @property
    def response(self) -> str: ...
    @property
    def ended(self) -> bool: ...
    @property
    def kl(self) -> float: ...
    @property
    def gold(self) -> float: ...
    @property
    def vader(self) -> float | None: ...


@dataclass(frozen=True)
class MetricSpec:
    """A metric.

    Attributes:
        name: display name in a reason.
        value: value for one prompt, from the challenger's and the champion's response.
        more_is_better: whether a high mean is in favour of the challenger.
        null_value: mean if the two are equal.
        value_format: format of the mean.
        margin_format: format of the bound.
    """

    name: str
    value: Callable[[ResponseScores, ResponseScores], float]
    more_is_better: bool
    null_value: float = 0.0
    value_format: str = "+.3f"
    margin_format: str = "+g"


METRICS: Mapping[str, MetricSpec] = {
    "win_rate": MetricSpec(
        "win rate against the champion", lambda ours, theirs: _pairwise_win(ours.gold, theirs.gold),
        more_is_better=True, null_value=0.5, value_format=".1%", margin_format=".0%",
    ),
    "win_rate_vader": MetricSpec(
        "VADER's win rate against the champion", lambda ours, theirs: _pairwise_win(_vader_score(challenger), _vader_score(champion)),
        more_is_better=True, null_value=0.5, value_format=".1%", margin_format=".0%",
    ),
    "reward_gold": MetricSpec(
        "gold reward less the champion's", lambda ours, theirs: ours.gold - theirs.gold, more_is_better=True
    ),
    "repetition": MetricSpec(
        "repetition less the champion's",
        lambda ours, theirs: repetition_rate(ours.response) - repetition_rate(theirs.response), more_is_better=False,
    ),
    "truncated_share": MetricSpec(
        "share without end less the champion's", lambda ours, theirs: float(theirs.ended) - float(ours.ended),
        more_is_better=False,
    ),
    "kl": MetricSpec(
        "KL to SFT less the champion's, nats", lambda ours, theirs: ours.kl - theirs.kl, more_is_better=False
    ),
}  # fmt: skip
"""Key of `gate.margins` → metric; each KL is to the SFT policy that the policy was trained from."""


def paired_interval(metric: str, challenger: Sequence[ResponseScores], champion: Sequence[ResponseScores], *, samples: int, seed: int) -> Interval:
    """Compute the metric's mean over paired prompts with its 95 % bootstrap interval.

    Args:
        samples: bootstrap resamples.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    values = [METRICS[metric].value(response, baseline) for response, baseline in zip(challenger, champion, strict=True)]
    return bootstrap_mean(values, samples=samples, seed=seed)


def noninferiority_rule(metric: str, interval: Interval, margin: float) -> Finding:
    """Check that the unfavourable end of the interval is within the margin of the null value."""
    spec = METRICS[metric]
    if spec.more_is_better:
        end, side, bound, relation = interval.low, "lower", spec.null_value - margin, "at least"
        passed = end >= bound
    else:
        end, side, bound, relation = interval.high, "upper", spec.null_value + margin, "at most"
        passed = end <= bound
    return Finding(
        f"{spec.name}, {side} end",
        format(end, spec.value_format),
        f"{relation} {format(bound, spec.margin_format)}",
        passed,
    )


def _pairwise_win(score: float, other: float) -> float:
    return pairwise_wins([score], [other])[0]


def _vader_score(answer: ResponseScores) -> float:
    assert answer.vader is not None, "params.yaml lets VADER judge where a margin names it"
    return answer.vader
