"""The gate: may this policy take the champion's place? A decision with its reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tasks.core.errors import ConfigError
from tasks.core.sections.gate import GateParams
from tasks.evals.compare import REFERENCE, Table
from tasks.evals.findings import Finding as Sign
from tasks.evals.noninferiority import no_worse
from tasks.evals.statistics import Interval
from tasks.runtime.provenance import RuleResult

__all__ = ["PARTS", "Decision", "candidate", "decide"]

PARTS = ("base_model", "sft")
"""What a policy is made of beside itself: its adapter lies on that of SFT, which lies on the base model."""


@dataclass(frozen=True)
class Decision:
    """What the gate says of a policy."""

    policy: str
    findings: tuple[RuleResult, ...]

    @property
    def accepted(self) -> bool:
        """Every rule holds."""
        return all(finding.passed for finding in self.findings)

    @property
    def reasons(self) -> tuple[str, ...]:
        """The rules that do not hold; all of them where the policy is accepted."""
        shown = [finding for finding in self.findings if self.accepted or not finding.passed]
        return tuple(f"{finding.rule}: {finding.measured}, asked {finding.required}" for finding in shown)


def candidate(table: Table, params: GateParams) -> str:
    """The policy that may be promoted.

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
    signs: Sequence[Sign],
    against_champion: Mapping[str, Interval] | None,
) -> Decision:
    """Apply the rules; where there is no champion yet, those about it do not count.

    Args:
        table: the evaluation, see `tasks.evals.compare`.
        policy: the candidate.
        params: the rules.
        signs: of reward hacking, that were found in the candidate.
        against_champion: each metric that has a margin, see `tasks.evals.noninferiority`.
    """
    row = table[policy]
    findings = [
        RuleResult(
            "win rate against SFT, lower end",
            f"{row['win_rate_low']:.1%}",
            f"above {params.min_win_rate:.0%}",
            row["win_rate_low"] > params.min_win_rate,
        ),
        RuleResult("KL to SFT", f"{row['kl']:.2f} nats", f"at most {params.max_kl:g} nats", row["kl"] <= params.max_kl),
        _no_hacking(signs, params.allowed_findings),
    ]
    if against_champion is not None:
        findings += [no_worse(metric, against_champion[metric], margin) for metric, margin in params.margins.items()]
    return Decision(policy, tuple(findings))


def _no_hacking(signs: Sequence[Sign], allowed: Sequence[str]) -> RuleResult:
    found = ", ".join(f"{sign.detector} ({sign.where})" for sign in signs)
    asked = f"none but {', '.join(allowed)}" if allowed else "none"
    holds = all(sign.detector in allowed for sign in signs)
    return RuleResult("signs of reward hacking", found or "none", asked, holds)
