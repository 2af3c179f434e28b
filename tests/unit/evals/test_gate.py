"""The gate's rules, each at its edge."""

from __future__ import annotations

import pytest

from tasks.core.errors import ConfigError
from tasks.core.sections.gate import GateParams
from tasks.evals.gate import candidate, decide
from tasks.evals.statistics import Interval

PARAMS = GateParams(policy="best", min_win_rate=0.5, max_kl=10, allowed_findings=["length_drift"], margin=0.05)


def row(low: float = 0.6, kl: float = 3.0) -> dict[str, float]:
    return {"win_rate": low + 0.1, "win_rate_low": low, "win_rate_high": low + 0.2, "kl": kl}


TABLE = {"sft": row(0.9, 0), "ppo": row(0.6), "grpo": row(0.7)}


def test_the_best_is_the_surest_of_those_that_were_trained() -> None:
    assert candidate(TABLE, PARAMS) == "grpo"
    assert candidate(TABLE, PARAMS.model_copy(update={"policy": "ppo"})) == "ppo"


@pytest.mark.parametrize("policy", ["dpo", "sft"])
def test_a_policy_that_was_not_evaluated_is_refused(policy: str) -> None:
    with pytest.raises(ConfigError, match=f"gate.policy is '{policy}'.*ppo, grpo"):
        candidate(TABLE, PARAMS.model_copy(update={"policy": policy}))


def test_with_all_off_there_is_nothing_to_promote() -> None:
    with pytest.raises(ConfigError, match="nothing to promote"):
        candidate({"sft": row()}, PARAMS)


@pytest.mark.parametrize(
    ("low", "kl", "detectors", "against", "failing"),
    [
        (0.6, 3.0, [], None, []),
        (0.501, 10.0, ["length_drift"], 0.45, []),
        (0.5, 3.0, [], None, ["win rate against SFT"]),
        (0.6, 10.01, [], None, ["KL to SFT"]),
        (0.6, 3.0, ["length_drift", "repetition"], None, ["signs of reward hacking"]),
        (0.6, 3.0, [], 0.4499, ["win rate against the champion"]),
        (0.4, 11.0, [], 0.3, ["win rate against SFT", "KL to SFT", "win rate against the champion"]),
    ],
)
def test_every_rule_must_hold(
    low: float, kl: float, detectors: list[str], against: float | None, failing: list[str]
) -> None:
    interval = None if against is None else Interval(mean=0.6, low=against, high=0.8)
    decision = decide({"ppo": row(low, kl)}, "ppo", PARAMS, detectors=detectors, against_champion=interval)
    assert decision.accepted is not bool(failing)
    assert [finding.rule.split(",")[0] for finding in decision.findings if not finding.holds] == failing
    assert len(decision.reasons) == (len(failing) or len(decision.findings))


def test_a_reason_has_both_numbers() -> None:
    decision = decide({"ppo": row(0.6, 12.345)}, "ppo", PARAMS, detectors=["kl_spike"], against_champion=None)
    assert decision.reasons == (
        "KL to SFT: 12.35 nats, asked at most 10 nats",
        "signs of reward hacking: kl_spike, asked none but length_drift",
    )
