"""The fits against curves whose coefficients are known, and best-of-n against every subset."""

import itertools
import math

import numpy as np
import pytest

from tasks.evals.overoptimisation import best_of_n, best_of_n_kl, curve, curve_peak, fit_curve, policy_point

KL = np.array([0.0, 0.25, 1.0, 4.0, 9.0, 16.0])
DISTANCE = np.array([0.0, 0.5, 1.0, 2.0, 3.0, 4.0])
RL_GAINS = [0.0, 0.5 * (1.5 + 0.6 * math.log(2)), 1.5, 2 * (1.5 - 0.6 * math.log(2)), 3 * (1.5 - 0.6 * math.log(3))]
RL_GAINS += [4 * (1.5 - 0.6 * math.log(4))]


def levels(values, prompts=40, noise=0.0, seed=0):
    spread = np.random.default_rng(seed).normal(scale=noise, size=(len(values), prompts)) if noise else 0.0
    return np.repeat(np.array(values)[:, None], prompts, axis=1) + spread


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_every_subset(n):
    draw = np.random.default_rng(1)
    proxy, gold = draw.normal(size=(2, 4, 5))
    expected = [
        np.mean([gold[row, max(chosen, key=lambda i: proxy[row, i])] for chosen in itertools.combinations(range(5), n)])
        for row in range(4)
    ]
    assert best_of_n(proxy, gold, n) == pytest.approx(expected)


def test_what_determines_nothing_is_refused():
    with pytest.raises(ValueError, match="best of 6 from 5 samples"):
        best_of_n(np.zeros((1, 5)), np.zeros((1, 5)), 6)
    with pytest.raises(ValueError, match="1 levels lie apart from SFT"):
        fit_curve("rl", levels([0.0, 1.0]), levels([0.0, 1.0]), samples=5, seed=0)


def test_kl_of_best_of_n():
    assert [best_of_n_kl(n) for n in (1, 2, 64)] == pytest.approx([0, 0.1931, 3.1745], abs=1e-4)


@pytest.mark.parametrize(
    ("form", "gains", "coefficients", "peak", "peak_fraction"),
    [
        ("best_of_n", [0, 0.875, 1.5, 2, 1.5, 0], (2, 0.5), 2, 1),  # R = d(2 − 0.5 d)
        ("rl", RL_GAINS, (1.5, 0.6), math.exp(1.5), 0),  # R = d(1.5 − 0.6 log d); its peak is beyond the last, 4
    ],
)
def test_the_fit_finds_the_coefficients_and_the_peak(form, gains, coefficients, peak, peak_fraction):
    found = fit_curve(form, levels(KL), levels(gains), samples=50, seed=0)
    assert (found.alpha.mean, found.beta.mean) == pytest.approx(coefficients)
    assert found.peak == pytest.approx(peak)
    assert found.r2 == pytest.approx(1)
    assert found.peak_fraction == peak_fraction
    assert curve(form, *coefficients, DISTANCE).tolist() == pytest.approx(gains)


def test_intervals_hold_the_truth_as_often_as_they_say_and_narrow_with_prompts():
    noisy = [levels(RL_GAINS, prompts=200, noise=0.5, seed=seed) for seed in range(100)]
    fits = [fit_curve("rl", levels(KL, prompts=200), gains, samples=200, seed=99) for gains in noisy]
    hits = sum(found.alpha.low < 1.5 < found.alpha.high for found in fits)
    assert 89 <= hits <= 99, "95 expected, standard deviation 2.2"
    many = fit_curve("rl", levels(KL, 2000), levels(RL_GAINS, 2000, noise=0.5), samples=200, seed=0)
    assert many.alpha.high - many.alpha.low < (fits[0].alpha.high - fits[0].alpha.low) / 2


@pytest.mark.parametrize(("form", "alpha", "beta"), [("best_of_n", 1, -0.1), ("rl", 1, 0), ("best_of_n", -1, 0.5)])
def test_where_nothing_turns_there_is_no_peak(form, alpha, beta):
    assert curve_peak(form, alpha, beta) is None


def test_a_policy_is_measured_by_the_mean_of_its_responses_to_each_prompt(judged):
    base = {"proxy": np.array([[0.0, 2.0], [4.0, 6.0]]), "gold": np.array([[1.0, 1.0], [1.0, 1.0]])}
    rows = (("p", 3, 1, 1), ("p", 5, 2, 3), ("q", 5, 4, 5), ("q", 5, 4, 6))
    records = [judged("ppo", prompt, proxy=proxy, gold=gold, kl=kl) for prompt, proxy, gold, kl in rows]
    level = policy_point("ppo", 3, records, base)
    assert level.kl.tolist() == [2, 5.5]
    spread = math.sqrt((9 + 1 + 1 + 9) / 3)
    assert level.gains["proxy"].tolist() == pytest.approx([(4 - 1) / spread, (5 - 5) / spread])
    assert level.gains["gold"].tolist() == [0.5, 3]
