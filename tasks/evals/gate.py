"""Rules of the promotion gate, and the decision with its reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.core.errors import ConfigError
from tasks.evals.champion import noninferiority_rule
from tasks.evals.compare import REFERENCE, Table
from tasks.evals.hacking_report import HackingFinding
from tasks.evals.statistics import Interval
from tasks.runtime.provenance import RuleResult

if TYPE_CHECKING:
    from tasks.config.evaluation import GateParams

__all__ = ["BASE_STAGES", "Decision", "decide", "select_candidate"]

BASE_STAGES = ("base_model", "sft")
"""Stages whose weights a policy's adapter builds on: the base model, then SFT."""


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
    """Select the policy to promote.

    Raises:
        ConfigError: it was not evaluated.
    """
    trained = [policy for policy in table if policy != REFERENCE]
    if not trained:
        raise ConfigError("nothing to promote: ppo, grpo and dpo are all off")
    if params.policy == "best":
        return max(trained, key=lambda policy: table[policy]["win_rate_low"])
    if params.policy not in trained:
        raise ConfigError(f"gate.policy is {params.policy!r}, but the policies evaluated are {', '.join(trained)}")
    return params.policy


def decide(
    table: Table,
    policy: str,
    params: GateParams,
    *,
    findings: Sequence[HackingFinding],
    against_champion: Mapping[str, Interval] | None,
) -> Decision:
    """Apply the rules; without a champion, the rules about it are skipped.

    Args:
        table: the evaluation, see `tasks.evals.compare`.
        policy: the candidate.
        params: the rules.
        findings: signs of reward hacking in the candidate.
        against_champion: each metric that has a margin, see `tasks.evals.champion`.
    """
    row = table[policy]
    rule_results = [
        RuleResult(
            "win rate against SFT, lower end",
            f"{row['win_rate_low']:.1%}",
            f"above {params.min_win_rate:.0%}",
            row["win_rate_low"] > params.min_win_rate,
        ),
        RuleResult("KL to SFT", f"{row['kl']:.2f} nats", f"at most {params.max_kl:g} nats", row["kl"] <= params.max_kl),
        _check_hacking(findings, params.allowed_detectors),
    ]
    if against_champion is not None:
        rule_results += [
            noninferiority_rule(metric, against_champion[metric], margin) for metric, margin in params.margins.items()
        ]
    return Decision(policy, tuple(rule_results))


def _check_hacking(findings: Sequence[HackingFinding], allowed: Sequence[str]) -> RuleResult:
    detectors = ", ".join(f"{finding.detector} ({finding.phase})" for finding in findings)
    required = f"none but {', '.join(allowed)}" if allowed else "none"
    passed = all(finding.detector in allowed for finding in findings)
    return RuleResult("signs of reward hacking", detectors or "none", required, passed)
