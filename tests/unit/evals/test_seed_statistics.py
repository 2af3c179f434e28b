"""Win rates over seeds and prompts: by hand, and against simulations whose truth is known."""

import math

import numpy as np
import pytest

from tasks.evals.seed_statistics import bootstrap_seeds, detectable_difference, variance_components, wins_by_prompt


def answer(policy: str, prompt: str, gold: float) -> dict[str, object]:
    return {"policy": policy, "prompt_id": prompt, "gold": gold}


def test_a_prompt_s_win_rate_is_the_mean_over_all_pairs_of_draws() -> None:
    """PPO 2 and 0 against SFT 1, 0 and −1: three wins, then a loss, a tie and a win: 4.5 of 6."""
    rows = [answer("sft", "a", gold) for gold in (1.0, 0.0, -1.0)] + [answer("ppo", "a", gold) for gold in (2.0, 0.0)]
    rows += [answer("sft", "b", 1.0), answer("ppo", "b", 0.0), answer("ppo", "c", 9.0)]
    assert wins_by_prompt(rows, "sft") == {"ppo": {"a": 0.75, "b": 0.0}}


def test_equal_values_have_an_interval_without_width() -> None:
    found = bootstrap_seeds([{"a": 0.5, "b": 0.5}, {"c": 0.5}], null=0.5)
    assert found == {"mean": 0.5, "low": 0.5, "high": 0.5, "p_value": 1.0}


def test_each_seed_counts_alike() -> None:
    assert bootstrap_seeds([{"a": 1.0}, {"b": 0.0, "c": 0.0, "d": 0.0}], null=0.5)["mean"] == 0.5


def normal(
    seeds: int, prompts: int, seed_std: float, prompt_std: float, *, shared: float = 0.0
) -> list[dict[str, float]]:
    """Seed effects, prompt effects that all seeds share, and noise; the prompts have the same names if they share."""
    rng = np.random.default_rng(3)
    effects = shared * rng.standard_normal(prompts)
    return [
        {f"{'' if shared else seed}/{prompt}": float(mean + effects[prompt] + noise)
         for prompt, noise in enumerate(prompt_std * rng.standard_normal(prompts))}
        for seed, mean in enumerate(seed_std * rng.standard_normal(seeds))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seed_std", "prompt_std", "shared"), [(0.0, 1.0, 0.0), (1.0, 0.1, 0.0), (0.3, 1.0, 0.0), (0.0, 0.1, 1.0)]
)
def test_the_interval_s_width_is_that_of_the_theory(seed_std: float, prompt_std: float, shared: float) -> None:
    """Squared errors add: of the seeds' means, their prompts' noise included, and of prompts, shared or each seed's."""
    seeds, prompts = 30, 40
    values = normal(seeds, prompts, seed_std, prompt_std, shared=shared)
    found = bootstrap_seeds(values, null=0.0)
    grid = np.array([list(own.values()) for own in values])
    between, across = grid.mean(1).var(), grid.mean(0).var() / prompts if shared else 0.0
    within = grid.var(1).mean() / prompts / seeds if not shared else 0.0
    expected = math.sqrt(between / seeds + across + within)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * expected, rel=0.1)


def test_a_difference_that_is_there_is_found_and_one_that_is_not_is_not() -> None:
    values = normal(6, 50, 0.05, 0.4)
    assert bootstrap_seeds(values, null=0.0)["p_value"] > 0.05
    far = [{name: value + 1 for name, value in own.items()} for own in values]
    assert bootstrap_seeds(far, null=0.0)["p_value"] == pytest.approx(2 / 2001)


def test_variance_components_by_hand() -> None:
    """Means 2 and 6, variance 8; within 2 and 2, of which 2/2 is in the means' variance: 7 and 2."""
    assert variance_components([{"a": 1.0, "b": 3.0}, {"c": 5.0, "d": 7.0}]) == pytest.approx((7.0, 2.0))
    assert variance_components([{"a": 0.0, "b": 2.0}, {"c": 0.0, "d": 2.0}])[0] == 0.0


def test_the_detectable_difference_by_tables() -> None:
    """Four seeds: t of 3 degrees of freedom is 3.182446 (97.5 %) and 0.978472 (80 %)."""
    found = detectable_difference(0.0004, 0.25, seeds=4, prompts=100)
    assert found == pytest.approx((3.182446 + 0.978472) * math.sqrt(0.0001 + 0.000625), rel=1e-5)


def test_that_difference_is_seen_in_four_of_five_trials() -> None:
    """An independent check by simulation: 2,000 trials of a t-test over eight seeds' means."""
    from scipy.stats import ttest_1samp

    seeds, prompts, between, within = 8, 50, 0.02, 0.4
    truth = detectable_difference(between**2, within**2, seeds=seeds, prompts=prompts)
    rng = np.random.default_rng(0)
    spread = math.sqrt(between**2 + within**2 / prompts)
    means = truth + spread * rng.standard_normal((2000, seeds))
    assert np.mean(ttest_1samp(means, 0.0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.03)
