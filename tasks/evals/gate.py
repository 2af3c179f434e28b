"""Rules of the promotion gate, and the decision with its reasons.

Against the champion: for each metric the whole 95 % interval of the difference, paired by prompt, must lie on the good
side of its margin, which tests non-inferiority at level 0.025 (Piaggio et al. 2012, JAMA 308:2594). A policy passes
only if it does so in every metric. That is an intersection–union test, whose level is that of its single tests (Berger
1982, Technometrics 24:295), so nothing has to be corrected for their number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from tasks.core.errors import ConfigError
from tasks.core.text_stats import repetition_rate
from tasks.evals.compare import REFERENCE, HackingFinding, ScoredResponse, Table
from tasks.evals.controls import doubt, pair_wins
from tasks.evals.statistics import Interval, bootstrap_mean
from tasks.runtime.provenance import RuleResult

if TYPE_CHECKING:
    from tasks.config.evaluation import GateParams

__all__ = [
    "BASE_STAGES", "METRICS", "Decision", "decide", "noninferiority_rule", "paired_interval", "select_candidate",
]  # fmt: skip

BASE_STAGES = ("base_model", "sft")
"""Stages whose weights a policy needs beside its own: base model and SFT, its reference."""


@dataclass(frozen=True)
class MetricSpec:
    """A metric of a response; the two policies are compared by its difference, or by whose is higher."""

    name: str
    score: Callable[[ScoredResponse], float]
    more_is_better: bool = False
    win: bool = False

    @property
    def null_value(self) -> float:
        """Mean if the two are equal."""
        return 0.5 if self.win else 0.0


METRICS: Mapping[str, MetricSpec] = {
    "win_rate": MetricSpec("win rate against the champion", attrgetter("gold"), True, win=True),
    "win_rate_vader": MetricSpec("VADER's win rate against the champion", attrgetter("vader"), True, win=True),
    "reward_gold": MetricSpec("gold reward less the champion's", attrgetter("gold"), True),
    "repetition": MetricSpec("repetition less the champion's", lambda answer: repetition_rate(answer.response)),
    "truncated_share": MetricSpec("share without end less the champion's", lambda answer: float(not answer.ended)),
    "kl": MetricSpec("KL to SFT less the champion's, nats", lambda answer: answer.kl or 0.0),
}
"""Key of `gate.margins` → metric; each KL is to the SFT policy that the policy was trained from."""


@dataclass(frozen=True)
class Decision:
    """Decision of the gate about a policy."""

    policy: str
    rule_results: tuple[RuleResult, ...]

    @property
    def accepted(self) -> bool:
        """Whether every rule passed."""
        return all(result.passed for result in self.rule_results)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Rules that failed; all rules if the policy is accepted."""
        shown = [result for result in self.rule_results if self.accepted or not result.passed]
        return tuple(f"{result.rule}: {result.measured}, required {result.required}" for result in shown)


def select_candidate(table: Table, params: GateParams) -> str:
    """Select the policy to promote; the best is the one whose win rate, if it is evidence, has the highest lower end.

    Raises:
        ConfigError: it was not evaluated.
    """
    trained = [policy for policy in table if policy != REFERENCE]
    if not trained:
        raise ConfigError("nothing to promote: ppo, grpo and dpo are all off")
    if params.policy == "best":
        return max(trained, key=lambda policy: _certainty(table[policy]))
    if params.policy not in trained:
        raise ConfigError(f"gate.policy is {params.policy!r}, but the policies evaluated are {', '.join(trained)}")
    return params.policy


def _certainty(row: Mapping[str, float]) -> tuple[float, ...]:
    """Whether the win rate is evidence, then its lower end; where that is equal, itself, then the smaller KL."""
    return not doubt(row), row["win_rate_low"], row["win_rate"], -row["kl"]


def decide(
    table: Table,
    policy: str,
    params: GateParams,
    *,
    findings: Sequence[HackingFinding],
    against_champion: Mapping[str, Interval] | None,
) -> Decision:
    """Apply the rules; without a champion, the rules about it are skipped, and doubts where no win rate is asked for.

    Args:
        findings: signs of reward hacking in the candidate.
        against_champion: each metric that has a margin, see `tasks.evals.champion`.
    """
    low, kl, reason = table[policy]["win_rate_low"], table[policy]["kl"], doubt(table[policy])
    rule_results = [
        RuleResult(
            "win rate against SFT, lower end", f"{low:.1%}", f"above {params.min_win_rate:.0%}",
            low > params.min_win_rate,
        ),
        RuleResult("KL to SFT", f"{kl:.2f} nats", f"at most {params.max_kl:g} nats", kl <= params.max_kl),
        _check_hacking(findings, params.allowed_detectors),
    ]  # fmt: skip
    if params.min_win_rate:
        rule_results.append(RuleResult("doubts about the win rate", reason or "none", "none", not reason))
    if against_champion is not None:
        rule_results += [
            noninferiority_rule(metric, against_champion[metric], margin) for metric, margin in params.margins.items()
        ]
    return Decision(policy, tuple(rule_results))


def paired_interval(
    metric: str,
    challenger: Sequence[Sequence[ScoredResponse]],
    champion: Sequence[Sequence[ScoredResponse]],
    *,
    samples: int,
    seed: int,
) -> Interval:
    """Compute the metric's mean over paired prompts with its 95 % interval from `samples` bootstrap resamples.

    A prompt counts with the mean over all pairs of the two policies' draws.

    Args:
        challenger, champion: [prompts][draws].

    Raises:
        ValueError: the two differ in their number of prompts, or are empty.
    """
    spec, values = METRICS[metric], []
    for draws in zip(challenger, champion, strict=True):
        own, theirs = (np.array([[spec.score(answer) for answer in answers]]) for answers in draws)
        pairs = pair_wins(own, theirs) if spec.win else own[:, :, None] - theirs[:, None, :]
        values.append(fmean(pairs.flat))
    return bootstrap_mean(values, samples=samples, seed=seed)


def noninferiority_rule(metric: str, interval: Interval, margin: float) -> RuleResult:
    """Check that the unfavourable end of the interval is within the margin of the null value."""
    spec = METRICS[metric]
    if spec.more_is_better:
        end, side, bound, relation = interval.low, "lower", spec.null_value - margin, "at least"
        passed = end >= bound
    else:
        end, side, bound, relation = interval.high, "upper", spec.null_value + margin, "at most"
        passed = end <= bound
    measured, required = (f"{end:.1%}", f"{bound:.0%}") if spec.win else (f"{end:+.3f}", f"{bound:+g}")
    return RuleResult(f"{spec.name}, {side} end", measured, f"{relation} {required}", passed)


def _check_hacking(findings: Sequence[HackingFinding], allowed: Sequence[str]) -> RuleResult:
    detectors = ", ".join(f"{finding.detector} ({finding.phase})" for finding in findings)
    required = f"none but {', '.join(allowed)}" if allowed else "none"
    passed = all(finding.detector in allowed for finding in findings)
    return RuleResult("signs of reward hacking", detectors or "none", required, passed)
