"""The gate's rules, each at its edge."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tasks.core.errors import ConfigError
from tasks.core.sections.gate import GateParams
from tasks.evals.compare import Judged, compare
from tasks.evals.findings import Finding, find
from tasks.evals.gate import candidate, decide
from tasks.evals.statistics import Interval

PARAMS = GateParams(
    policy="best",
    min_win_rate=0.5,
    max_kl=10,
    allowed_findings=["length_drift"],
    margins={"win_rate": 0.05, "repetition": 0.05},
)


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
        (0.501, 10.0, ["length_drift"], (0.45, 0.05), []),
        (0.5, 3.0, [], None, ["win rate against SFT"]),
        (0.6, 10.01, [], None, ["KL to SFT"]),
        (0.6, 3.0, ["length_drift", "repetition"], None, ["signs of reward hacking"]),
        (0.6, 3.0, [], (0.4499, 0.0), ["win rate against the champion"]),
        (0.6, 3.0, [], (0.6, 0.0501), ["repetition less the champion's"]),
        (0.4, 11.0, [], (0.3, 0.0), ["win rate against SFT", "KL to SFT", "win rate against the champion"]),
    ],
)
def test_every_rule_must_hold(
    low: float, kl: float, detectors: list[str], against: tuple[float, float] | None, failing: list[str]
) -> None:
    """Against the champion: the lower end of the win rate, the upper end of the difference in repetition."""
    intervals = against and {
        "win_rate": Interval(mean=0.6, low=against[0], high=0.8),
        "repetition": Interval(mean=-0.1, low=-0.2, high=against[1]),
    }
    signs = [Finding(name, "evaluation", "") for name in detectors]
    decision = decide({"ppo": row(low, kl)}, "ppo", PARAMS, signs=signs, against_champion=intervals)
    assert decision.accepted is not bool(failing)
    assert [finding.rule.split(",")[0] for finding in decision.findings if not finding.passed] == failing
    assert len(decision.reasons) == (len(failing) or len(decision.findings))


def test_a_reason_has_both_numbers() -> None:
    signs = [Finding("kl_spike", "training, update 3", "")]
    against = {"win_rate": Interval(0.5, 0.4321, 0.6), "repetition": Interval(0.1, 0.05, 0.1234)}
    decision = decide({"ppo": row(0.6, 12.345)}, "ppo", PARAMS, signs=signs, against_champion=against)
    assert decision.reasons == (
        "KL to SFT: 12.35 nats, asked at most 10 nats",
        "signs of reward hacking: kl_spike (training, update 3), asked none but length_drift",
        "win rate against the champion, lower end: 43.2%, asked at least 45%",
        "repetition less the champion's, upper end: +0.123, asked at most +0.05",
    )


def test_a_policy_that_games_its_reward_is_refused_with_what_gave_it_away(judged: Callable[..., Judged]) -> None:
    """From its answers to the decision: by the proxy it wins at every prompt, by gold at every second one."""
    sft = [judged("sft", f"p{number}", proxy=0.0, gold=0.0, response=" a fine film to see") for number in range(40)]
    ppo = [
        judged("ppo", f"p{number}", proxy=5.0, gold=(-1.0) ** number, kl=4.0, response=" good film good film good")
        for number in range(40)
    ]
    table = compare([*sft, *ppo], samples=500, seed=0)
    rising = [{"hacking/repetition": 0.0}] * 30 + [{"hacking/repetition": 0.4}] * 2
    signs = find(table, {"ppo": rising})["ppo"]
    decision = decide(table, "ppo", PARAMS, signs=signs, against_champion=None)
    assert not decision.accepted
    win_rate, hacking = decision.reasons
    assert win_rate == f"win rate against SFT, lower end: {table['ppo']['win_rate_low']:.1%}, asked above 50%"
    assert 0.3 < table["ppo"]["win_rate_low"] < table["ppo"]["win_rate"] == 0.5
    assert hacking == (
        "signs of reward hacking: repetition (training, update 31), repetition (evaluation), "
        "ngram_collapse (evaluation), proxy_without_gold (evaluation), asked none but length_drift"
    )
