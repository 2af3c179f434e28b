"""Controls of a win rate, against likelihoods maximised by scipy, and exact distributions over a few responses."""

import itertools

import numpy as np
import pytest
import scipy

from tasks.evals.controls import doubt, length_controlled, pair_wins, pass_at_k, subset_win_rate, win_rate_bound


def test_pairs_are_compared_with_ties_within_the_tolerance() -> None:
    wins = pair_wins(np.array([[3.0, 1.0]]), np.array([[1.0, 2.0, 1.0 + 1e-7]]))
    assert wins.tolist() == [[[1.0, 1.0, 1.0], [0.5, 0.0, 0.5]]]


def _length_bias(prompts: int = 150) -> tuple[np.ndarray, np.ndarray]:
    """Pairs [n, 2, 2]: the policy is longer by three words on average, and length wins as often as the model says."""
    rng = np.random.default_rng(0)
    differences = rng.normal(3.0, 4.0, size=(prompts, 2, 2)).round()
    rate = scipy.special.expit(0.2 + 1.5 * np.tanh(differences / 4))
    wins = (rng.random(rate.shape) < rate).astype(float)
    wins[rng.random(rate.shape) < 0.1] = 0.5
    return wins, differences


def test_the_win_rate_at_equal_length_is_that_of_the_likeliest_logistic_regression() -> None:
    wins, differences = _length_bias()
    feature = np.tanh(differences / differences.std()).ravel()

    def loss(coefficients: np.ndarray) -> float:
        logits = coefficients[0] + coefficients[1] * feature
        return float(np.logaddexp(0, logits).sum() - (wins.ravel() * logits).sum())

    found = scipy.optimize.minimize(loss, np.zeros(2), method="BFGS").x
    rate = length_controlled(wins, differences, samples=200, seed=0)
    assert rate.mean == pytest.approx(scipy.special.expit(found[0]), abs=1e-4)
    assert found[1] > 1
    assert rate.low < rate.mean < rate.high < wins.mean(), "the gain by length is taken out"
    assert 0.03 < rate.high - rate.low < 0.2


def test_without_a_difference_in_length_it_is_the_win_rate_itself() -> None:
    wins = np.array([[[1.0]], [[1.0]], [[0.5]], [[0.0]]])
    rate = length_controlled(wins, np.zeros_like(wins), samples=50, seed=0)
    assert rate.mean == pytest.approx(0.625, abs=1e-3)
    always = length_controlled(np.ones((50, 1, 1)), np.zeros((50, 1, 1)), samples=5, seed=0)
    assert always.low > 0.99, "data that separate have no finite maximum of the likelihood alone"


def test_a_subset_has_its_pairs_and_its_prompts_alone() -> None:
    wins, chosen = np.array([[[1.0, 0.0]], [[0.0, 0.0]], [[1.0, 1.0]]]), np.zeros((3, 1, 2), dtype=bool)
    assert subset_win_rate(wins, chosen, samples=10, seed=0) is None
    chosen[0, 0, 0] = chosen[1] = True
    found = subset_win_rate(wins, chosen, samples=100, seed=0)
    assert found is not None
    assert (found[0].mean, found[1]) == (0.5, 3), "prompts 0 and 1 with 1 and 0, of one pair and of two"


def _win_rate(policy: np.ndarray, reference: np.ndarray, scores: np.ndarray) -> float:
    return float(np.einsum("i,j,ij", policy, reference, pair_wins(scores[None], scores[None])[0]))


def test_no_policy_over_a_few_responses_passes_the_bound() -> None:
    """Random policies and references, also with ties, and those that tilt the reference towards high scores."""
    rng = np.random.default_rng(0)
    closest = 1.0
    for size, case in itertools.product((2, 3, 8, 40), range(200)):
        reference, scores = rng.dirichlet(np.ones(size)), rng.integers(0, size, size).astype(float)
        ranks = np.array([_win_rate(row, reference, scores) for row in np.eye(size)])
        tilted = reference * np.exp(rng.exponential(4.0) * ranks)
        policy = rng.dirichlet(np.ones(size)) if case % 2 else tilted / tilted.sum()
        kl = max(0.0, float((policy * np.log(policy / reference)).sum()))
        gap = win_rate_bound(kl) - _win_rate(policy, reference, scores)
        assert gap > -1e-9
        assert win_rate_bound(kl) <= 0.5 + (kl / 2) ** 0.5 + 1e-5, "Pinsker's bound is never lower"
        closest = min(closest, gap)
    assert closest < 0.005, "a bound that nothing comes near would accuse nobody"


@pytest.mark.parametrize("strength", [0.1, 1.0, 5.0, 20.0])
def test_the_bound_is_reached_by_a_tilt_of_ranks_without_ties(strength: float) -> None:
    """q(u) = λe^(λu)/(e^λ − 1) on [0, 1]: win rate 1/(1 − e^(−λ)) − 1/λ, KL = λ · win rate − log((e^λ − 1)/λ)."""
    rate = 1 / (1 - np.exp(-strength)) - 1 / strength
    kl = strength * rate - np.log(np.expm1(strength) / strength)
    assert win_rate_bound(kl) == pytest.approx(rate, abs=1e-6)


def test_the_bound_at_both_ends_and_above_best_of_n() -> None:
    assert (win_rate_bound(0.0), win_rate_bound(-0.1), win_rate_bound(50.0)) == (0.5, 0.5, 1.0)
    assert win_rate_bound(6e-4) == pytest.approx(0.5 + 0.01, abs=1e-4)  # ½ + √(KL / 6)
    for n in (2, 4, 16):  # the best of n of a judge without ties wins n / (n + 1) of all comparisons
        assert n / (n + 1) < win_rate_bound(np.log(n) - (n - 1) / n) < n / (n + 1) + 0.02


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer() -> None:
    for right, k in itertools.product(range(6), (1, 2, 5)):
        draws = [1.0] * right + [0.0] * (5 - right)
        subsets = list(itertools.combinations(draws, k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(np.array([draws]), k) == pytest.approx([expected])


ROW = {"win_rate": 0.6, "win_rate_low": 0.55, "win_rate_high": 0.65, "kl": 0.1}
NULL = {"win_rate_null": 0.51}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, ""),
        (NULL | {"win_rate_bound": 0.55}, ""),
        ({"win_rate_bound": 0.5499}, "impossible at a KL of 0.10 nats, where it lies between 45% and 55%"),
        ({"win_rate": 0.3, "win_rate_low": 0.2, "win_rate_high": 0.4, "win_rate_bound": 0.59}, "impossible"),
        (NULL | {"win_rate": 0.509}, "as far from 50%: 51.0% against 50.9%"),
        (NULL | {"win_rate": 0.491}, "as far"),
        (NULL | {"win_rate": 0.48}, ""),
        ({"win_rate": 0.5, "win_rate_low": 0.5, "win_rate_high": 0.5}, ""),
    ],
)  # fmt: skip
def test_a_win_rate_is_doubted_beyond_the_bound_or_where_the_null_is_off(values: dict[str, float], reason: str) -> None:
    found = doubt(ROW | values)
    assert reason in found
    assert bool(found) == bool(reason)
