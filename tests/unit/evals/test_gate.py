"""Rules of the gate, each at its boundary; metrics against the champion on paired cases computed by hand."""

from collections.abc import Callable
from typing import get_args

import pytest

from tasks.config import evaluation
from tasks.config.evaluation import GateParams
from tasks.core.errors import ConfigError
from tasks.evals.compare import HackingFinding, ScoredResponse, compare_policies
from tasks.evals.gate import METRICS, decide, noninferiority_rule, paired_interval, select_candidate
from tasks.evals.statistics import Interval
from tasks.evaluate import find_hacking

Make = Callable[..., ScoredResponse]

MARGINS = {"win_rate": 0.05, "repetition": 0.05}
PARAMS = GateParams(policy="best", min_win_rate=0.5, max_kl=10, allowed_detectors=["length_drift"], margins=MARGINS)


def row(low: float = 0.6, kl: float = 3.0) -> dict[str, float]:
    return {"win_rate": low + 0.1, "win_rate_low": low, "win_rate_high": low + 0.2, "kl": kl}


TABLE = {"sft": row(0.9, 0), "ppo": row(0.6), "grpo": row(0.7)}


def test_the_best_is_the_surest_of_those_that_were_trained() -> None:
    assert select_candidate(TABLE, PARAMS) == "grpo"
    assert select_candidate(TABLE, PARAMS.model_copy(update={"policy": "ppo"})) == "ppo"


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"win_rate": 0.56}, {"win_rate": 0.5}),
        ({"win_rate": 0.56, "kl": 9.0}, {"win_rate": 0.5, "kl": 1.0}),
        ({"win_rate": 0.56, "kl": 1.0}, {"win_rate": 0.56, "kl": 1.5}),
    ],
)
def test_of_two_that_are_as_sure_the_better_is_chosen_whatever_their_order(
    better: dict[str, float], worse: dict[str, float]
) -> None:
    rows = {"one": row(0.5) | worse, "other": row(0.5) | better}
    assert select_candidate(rows, PARAMS) == "other"
    assert select_candidate(dict(reversed(rows.items())), PARAMS) == "other"


def test_a_win_rate_that_is_no_evidence_makes_no_best_policy() -> None:
    noise = TABLE | {"grpo": row(0.7, kl=0.01) | {"win_rate_bound": 0.54}}
    assert select_candidate(noise, PARAMS) == "ppo"


def test_a_policy_that_was_not_evaluated_is_refused() -> None:
    for policy in ("dpo", "sft"):
        with pytest.raises(ConfigError, match=f"gate.policy is '{policy}'.*ppo, grpo"):
            select_candidate(TABLE, PARAMS.model_copy(update={"policy": policy}))
    with pytest.raises(ConfigError, match="nothing to promote"):
        select_candidate({"sft": row()}, PARAMS)


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
        (0.51, 0.1, [], None, ["doubts about the win rate"]),
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
    signs = [HackingFinding(name, "evaluation", "") for name in detectors]
    table = {"ppo": row(low, kl) | {"win_rate_bound": 0.5 if kl == 0.1 else 1.0}}
    decision = decide(table, "ppo", PARAMS, findings=signs, against_champion=intervals)
    assert decision.accepted is not bool(failing)
    assert [finding.rule.split(",")[0] for finding in decision.rule_results if not finding.passed] == failing
    assert len(decision.reasons) == (len(failing) or len(decision.rule_results))


def test_a_doubt_counts_only_where_a_win_rate_is_asked_for() -> None:
    table = {"ppo": row(0.4, 3.0) | {"win_rate_bound": 0.39}}
    for least, passed in ((0.0, True), (0.1, False)):
        params = PARAMS.model_copy(update={"min_win_rate": least})
        assert decide(table, "ppo", params, findings=[], against_champion=None).accepted is passed


def test_a_reason_has_both_numbers() -> None:
    signs = [HackingFinding("kl_spike", "training, update 3", "")]
    against = {"win_rate": Interval(0.5, 0.4321, 0.6), "repetition": Interval(0.1, 0.05, 0.1234)}
    against |= {"reward_gold": Interval(0.0, -0.3, 0.3), "kl": Interval(0.4, 0.1, 0.75)}
    params = PARAMS.model_copy(update={"margins": MARGINS | {"reward_gold": 0.1, "kl": 0.5}})
    decision = decide({"ppo": row(0.6, 12.345)}, "ppo", params, findings=signs, against_champion=against)
    assert decision.reasons == (
        "KL to SFT: 12.35 nats, required at most 10 nats",
        "signs of reward hacking: kl_spike (training, update 3), required none but length_drift",
        "win rate against the champion, lower end: 43.2%, required at least 45%",
        "repetition less the champion's, upper end: +0.123, required at most +0.05",
        "gold reward less the champion's, lower end: -0.300, required at least -0.1",
        "KL to SFT less the champion's, nats, upper end: +0.750, required at most +0.5",
    )


def test_a_policy_that_games_its_reward_is_refused_with_what_gave_it_away(judged: Make) -> None:
    """From its answers to the decision: by the proxy it wins at every prompt, by gold at every second one."""
    hacked = {"proxy": 5.0, "kl": 4.0, "response": " good film good film good"}
    sft = [judged("sft", str(number), response=" a fine film to see") for number in range(40)]
    ppo = [judged("ppo", str(number), gold=(-1.0) ** number, **hacked) for number in range(40)]
    table = compare_policies([*sft, *ppo], samples=500, seed=0)
    rising = [{"hacking/repetition": 0.0}] * 30 + [{"hacking/repetition": 0.4}] * 2
    signs = find_hacking(table, {"ppo": rising})["ppo"]
    decision = decide(table, "ppo", PARAMS, findings=signs, against_champion=None)
    assert not decision.accepted
    win_rate, hacking = decision.reasons
    assert win_rate == f"win rate against SFT, lower end: {table['ppo']['win_rate_low']:.1%}, required above 50%"
    assert 0.3 < table["ppo"]["win_rate_low"] < table["ppo"]["win_rate"] == 0.5
    assert hacking == (
        "signs of reward hacking: repetition (training, update 31), repetition (evaluation), "
        "ngram_collapse (evaluation), proxy_without_gold (evaluation), required none but length_drift"
    )


def test_every_metric_that_params_may_name_is_one() -> None:
    assert tuple(METRICS) == get_args(evaluation.Metric)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("win_rate", (1 + 0.5 + 0 + 0) / 4),
        ("win_rate_vader", (1 + 1 + 1 + 0) / 4),
        ("reward_gold", (2 + 0 - 1 - 1) / 4),
        ("repetition", 0.5 / 4),  # one of the two word pairs of "good good good" is a repetition
        ("truncated_share", (1 + 1 + 0 - 1) / 4),
        ("kl", (2.5 + 0.5 + 0.5 + 0.5) / 4),
    ],
)
def test_means_by_hand(judged: Make, metric: str, expected: float) -> None:
    """Gold: a wins by 2, b ties, c and d lose by 1; swapped, one's gain is the other's loss."""
    challenger = [
        judged("ppo", "a", gold=3.0, vader=0.5, kl=4.0, response=" good good good", ended=False),
        judged("ppo", "b", gold=1.0, vader=0.5, kl=2.0, ended=False),
        judged("ppo", "c", gold=0.0, vader=0.5, kl=2.0),
        judged("ppo", "d", gold=0.0, vader=-0.5, kl=2.0),
    ]
    champion = [judged("old", name, gold=1.0, vader=0.0, kl=1.5, ended=name != "d") for name in "abcd"]
    own, others = ([[record] for record in records] for records in (challenger, champion))
    found = paired_interval(metric, own, others, samples=200, seed=0)
    assert found.mean == pytest.approx(expected)
    assert found.low < expected < found.high
    swapped = paired_interval(metric, others, own, samples=200, seed=0)
    assert swapped.mean == pytest.approx(2 * METRICS[metric].null_value - expected)


def test_answers_are_paired(judged: Make) -> None:
    """Two policies whose repetition differs from prompt to prompt, but never from each other: no doubt about zero."""
    texts = [" good good good", " a b", " so so so so", " c"]
    challenger, champion = (
        [[judged(name, str(n), response=text)] for n, text in enumerate(texts)] for name in ("ppo", "old")
    )
    assert paired_interval("repetition", challenger, champion, samples=100, seed=0) == Interval(0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"zip\(\) argument 2"):
        paired_interval("repetition", challenger, champion[:3], samples=100, seed=0)


def test_a_prompt_counts_with_the_mean_over_all_pairs_of_draws(judged: Make) -> None:
    """Prompt a: 3 beats 1 and 2, 1 ties with 1 and loses to 2: (1 + 1 + ½ + 0) / 4. Prompt b: 0 loses to both."""
    challenger = [[judged("ppo", "a", gold=gold) for gold in (3.0, 1.0)], [judged("ppo", "b", gold=0.0)]]
    champion = [[judged("old", name, gold=gold) for gold in (1.0, 2.0)] for name in "ab"]
    assert paired_interval("win_rate", challenger, champion, samples=10, seed=0).mean == 0.625 / 2
    assert paired_interval("reward_gold", challenger, champion, samples=10, seed=0).mean == (0.5 - 1.5) / 2


@pytest.mark.parametrize(
    ("metric", "interval", "margin", "passed"),
    [
        ("win_rate", (0.55, 0.45, 0.65), 0.05, True),
        ("win_rate", (0.55, 0.4499, 0.65), 0.05, False),
        ("reward_gold", (0.1, -0.2, 0.4), 0.2, True),
        ("reward_gold", (0.1, -0.2001, 0.4), 0.2, False),
        ("repetition", (0.0, -0.3, 0.05), 0.05, True),
        ("repetition", (0.0, -0.3, 0.0501), 0.05, False),
        ("truncated_share", (-0.1, -0.2, 0.0), 0.0, True),
        ("truncated_share", (0.1, 0.0001, 0.2), 0.0, False),
        ("kl", (-1.0, -9.0, 0.5), 0.5, True),
        ("kl", (-1.0, -9.0, 0.51), 0.5, False),
    ],
)
def test_the_bad_end_of_the_interval_decides(
    metric: str, interval: tuple[float, float, float], margin: float, passed: bool
) -> None:
    assert noninferiority_rule(metric, Interval(*interval), margin).passed is passed
