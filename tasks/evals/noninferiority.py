"""Is a policy worse than the champion by more than a margin? Metric by metric, on their answers to the same prompts.

For each metric the whole 95 % interval of the paired difference must lie on the good side of its margin, which tests
non-inferiority at level 0.025 (Piaggio et al. 2012, JAMA 308:2594). A policy passes only if it does so in every metric.
That is an intersection–union test, whose level is that of its single tests (Berger 1982, Technometrics 24:295), so
nothing has to be corrected for their number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tasks.core.words import repeated_share
from tasks.evals.statistics import Interval, bootstrap_mean, wins
from tasks.runtime.provenance import RuleResult

__all__ = ["METRICS", "Comparison", "Scored", "compared", "no_worse"]


class Scored(Protocol):
    """One response with what metrics need; the fields mean what they mean in `tasks.evals.compare.Judged`."""

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
class Comparison:
    """A metric.

    Attributes:
        name: what it is called in a reason.
        value: what one prompt gives, from the policy's answer and the champion's.
        more_is_better: whether a high mean speaks for the policy.
        even: the mean where they are alike.
        form: how a mean is written.
        margin_form: how the bound is written.
    """

    name: str
    value: Callable[[Scored, Scored], float]
    more_is_better: bool
    even: float = 0.0
    form: str = "+.3f"
    margin_form: str = "+g"


METRICS: Mapping[str, Comparison] = {
    "win_rate": Comparison(
        "win rate against the champion", lambda ours, theirs: _win(ours.gold, theirs.gold),
        more_is_better=True, even=0.5, form=".1%", margin_form=".0%",
    ),
    "win_rate_vader": Comparison(
        "VADER's win rate against the champion", lambda ours, theirs: _win(_vader(ours), _vader(theirs)),
        more_is_better=True, even=0.5, form=".1%", margin_form=".0%",
    ),
    "reward_gold": Comparison(
        "gold reward less the champion's", lambda ours, theirs: ours.gold - theirs.gold, more_is_better=True
    ),
    "repetition": Comparison(
        "repetition less the champion's",
        lambda ours, theirs: repeated_share(ours.response) - repeated_share(theirs.response), more_is_better=False,
    ),
    "no_end_share": Comparison(
        "share without end less the champion's", lambda ours, theirs: float(theirs.ended) - float(ours.ended),
        more_is_better=False,
    ),
    "kl": Comparison(
        "KL to SFT less the champion's, nats", lambda ours, theirs: ours.kl - theirs.kl, more_is_better=False
    ),
}  # fmt: skip
"""Key of `gate.margins` → what it compares; the KL of each is to the SFT policy that it was trained from."""


def compared(metric: str, ours: Sequence[Scored], theirs: Sequence[Scored], *, samples: int, seed: int) -> Interval:
    """The metric's mean over prompts with its 95 % bootstrap interval; the two answer the same prompts in one order.

    Args:
        samples: bootstrap resamples.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    values = [METRICS[metric].value(our, their) for our, their in zip(ours, theirs, strict=True)]
    return bootstrap_mean(values, samples=samples, seed=seed)


def no_worse(metric: str, interval: Interval, margin: float) -> RuleResult:
    """The rule that the bad end of the interval is at most the margin worse than even."""
    comparison = METRICS[metric]
    if comparison.more_is_better:
        end, word, bound, sign = interval.low, "lower", comparison.even - margin, "at least"
        holds = end >= bound
    else:
        end, word, bound, sign = interval.high, "upper", comparison.even + margin, "at most"
        holds = end <= bound
    return RuleResult(
        f"{comparison.name}, {word} end",
        format(end, comparison.form),
        f"{sign} {format(bound, comparison.margin_form)}",
        holds,
    )


def _win(score: float, other: float) -> float:
    return wins([score], [other])[0]


def _vader(answer: Scored) -> float:
    assert answer.vader is not None, "params.yaml lets VADER judge where a margin names it"
    return answer.vader
