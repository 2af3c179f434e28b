"""KL estimators and their gradients against the exact divergence, every expectation a sum over all that can be sampled.

One token of a vocabulary of three, and all responses of up to two such tokens for what spans a whole response. And the
adaptive controller settles at its target, on a plant that answers late, noisily and not linearly.
"""

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tasks.rl.advantages import gae, token_rewards
from tasks.rl.kl import AdaptiveKL, FixedKL, KLEstimates, kl_estimates, per_sequence
from tasks.rl.losses import kl_loss, policy_loss

V = 3
POLICY = torch.tensor([0.3, -0.7, 0.4], dtype=torch.float64)
REFERENCE = torch.tensor([-0.2, 0.5, 0.1], dtype=torch.float64)
EACH = torch.ones(V, 1, dtype=torch.bool)  # the batch holds every token once: B = V, T = 1


def divergence(logits: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(logits) ‖ softmax(other)) by its definition."""
    p, q = torch.log_softmax(logits, -1), torch.log_softmax(other, -1)
    return (p.exp() * (p - q)).sum()


def gradient(scalar: Tensor, logits: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(scalar, logits)
    return result


def estimates(logits: Tensor) -> KLEstimates:
    """The estimators at each of the three tokens, [3, 1]."""
    return kl_estimates(torch.log_softmax(logits, -1)[:, None], torch.log_softmax(REFERENCE, -1)[:, None], EACH)


def expectation(per_token: Tensor, logits: Tensor) -> Tensor:
    """Σ_v π(v) · x_v with π constant: the mean over infinitely many samples, differentiated through x alone."""
    return (torch.softmax(logits.detach(), -1) * per_token[:, 0]).sum()


def test_k1_and_k3_are_unbiased() -> None:
    kl, exact = estimates(POLICY), divergence(POLICY, REFERENCE).item()
    assert exact > 0.1
    assert expectation(kl.k1, POLICY).item() == pytest.approx(exact, rel=1e-14)
    assert expectation(kl.k3, POLICY).item() == pytest.approx(exact, rel=1e-14)
    assert (kl.k1 < 0).any(), "k1 of a single token may be negative"
    assert (kl.k3 >= 0).all(), "k3 of a single token may not"


def test_k2_is_biased_but_right_to_second_order() -> None:
    k2, exact = expectation(estimates(POLICY).k2, POLICY).item(), divergence(POLICY, REFERENCE).item()
    assert k2 != pytest.approx(exact, rel=0.01)
    errors = []
    for size in (0.01, 0.005):
        near = REFERENCE + size * POLICY
        errors.append(abs(expectation(estimates(near).k2, near).item() - divergence(near, REFERENCE).item()))
    # The error is of third order: half the distance, an eighth of the error.
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.02)


@pytest.mark.parametrize(("name", "expected"), [("k1", "nothing"), ("k2", "divergence"), ("k3", "other divergence")])
def test_the_gradient_of_each_estimator_as_a_loss(name: str, expected: str) -> None:
    logits = POLICY.clone().requires_grad_()
    found = gradient(expectation(getattr(estimates(logits), name), logits), logits)
    own, other = gradient(divergence(logits, REFERENCE), logits), gradient(divergence(REFERENCE, logits), logits)
    gradients = {"nothing": torch.zeros_like(own), "divergence": own, "other divergence": other}
    torch.testing.assert_close(found, gradients[expected], rtol=1e-12, atol=1e-15)
    assert not torch.allclose(own, other, rtol=0.01)


def test_k3_with_the_ratio_as_a_loss_has_the_gradient_of_the_divergence() -> None:
    """Through GRPO's loss, on tokens that the policy itself sampled."""
    logits = POLICY.clone().requires_grad_()
    logprobs = torch.log_softmax(logits, -1)[:, None]
    reference, weights = torch.log_softmax(REFERENCE, -1)[:, None], torch.softmax(POLICY, -1)[:, None]
    loss = kl_loss(logprobs, logprobs, reference, EACH, weights=weights).loss
    expected = gradient(divergence(logits, REFERENCE), logits)
    torch.testing.assert_close(gradient(loss, logits), expected, rtol=1e-12, atol=1e-15)


def test_k3_with_the_ratio_off_policy() -> None:
    """On tokens of another policy, as after the first step of an update: still the value and gradient of the policy."""
    logits, sampled = POLICY.clone().requires_grad_(), torch.tensor([-0.1, 0.6, -0.8], dtype=torch.float64)
    logprobs, old = torch.log_softmax(logits, -1)[:, None], torch.log_softmax(sampled, -1)[:, None]
    loss = kl_loss(logprobs, old, torch.log_softmax(REFERENCE, -1)[:, None], EACH, weights=old.exp()).loss
    exact = divergence(logits, REFERENCE)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-12)
    torch.testing.assert_close(gradient(loss, logits), gradient(exact, logits), rtol=1e-12, atol=1e-15)


def test_k1_in_the_reward_has_the_gradient_of_the_divergence() -> None:
    """Through the product's own way: estimator → reward → policy loss at ratio 1."""
    logits = POLICY.clone().requires_grad_()
    logprobs = torch.log_softmax(logits, -1)[:, None]
    k1 = estimates(logits.detach()).k1
    rewards = token_rewards(torch.zeros(V, dtype=torch.float64), k1, EACH, kl_coef=1.0)
    loss = _expected_policy_loss(logprobs, rewards, EACH, torch.softmax(POLICY, -1))
    expected = gradient(divergence(logits, REFERENCE), logits)
    torch.testing.assert_close(gradient(loss, logits), expected, rtol=1e-12, atol=1e-15)


def _expected_policy_loss(logprobs: Tensor, gains: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Σ_b weight_b · (policy loss of response b, summed over its tokens)."""
    losses = [
        policy_loss(logprobs[[b]], logprobs.detach()[[b]], gains[[b]], mask[[b]], clip_range=0.2, token_count=1).loss
        for b in range(len(weights))
    ]
    return (weights * torch.stack(losses)).sum()


# -- responses of up to two tokens: token 0 is the end token, so one of the responses is one token long ----------------


def _responses() -> tuple[Tensor, Tensor]:
    """All responses that can be sampled, [7, 2] tokens and mask: `0`, and `a b` for a in 1, 2 and any b."""
    pairs = [(0, 0), *itertools.product((1, 2), (0, 1, 2))]
    tokens = torch.tensor(pairs)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 1] = False
    return tokens, mask


def _logprobs(table: Tensor, tokens: Tensor) -> Tensor:
    """[7, 2] under a table [4, 3] of logits: row 0 for the first token, row 1 + a for the token after a."""
    normed = torch.log_softmax(table, -1)
    return torch.stack([normed[0][tokens[:, 0]], normed[1 + tokens[:, 0], tokens[:, 1]]], dim=1)


def _sequence_logprobs(table: Tensor) -> Tensor:
    tokens, mask = _responses()
    return torch.where(mask, _logprobs(table, tokens), 0.0).sum(1)


def test_the_penalty_on_a_whole_response_has_the_gradient_of_its_divergence() -> None:
    """Score and KL penalty, through GAE with λ = 1: the gradient of E[score] − β · KL over whole responses."""
    generator = torch.Generator().manual_seed(2)
    table, reference = (torch.randn(4, V, generator=generator, dtype=torch.float64) for _ in range(2))
    table.requires_grad_()
    tokens, mask = _responses()
    scores = torch.randn(len(tokens), generator=generator, dtype=torch.float64)
    values = torch.randn(4, generator=generator, dtype=torch.float64)  # any function of the state is a valid baseline
    baseline = torch.stack([values[0].expand(len(tokens)), values[1 + tokens[:, 0]]], dim=1)
    beta = 0.3

    sequence, other = _sequence_logprobs(table), _sequence_logprobs(reference)
    assert sequence.exp().sum().item() == pytest.approx(1, rel=1e-12), "the enumeration must be complete"
    objective = (sequence.exp() * (scores - beta * (sequence - other))).sum()

    logprobs = _logprobs(table, tokens)
    kl = kl_estimates(logprobs.detach(), _logprobs(reference, tokens), mask)
    weights = sequence.detach().exp()
    exact = (weights * (sequence - other).detach()).sum().item()
    assert (weights * per_sequence(kl.k1, mask)).sum().item() == pytest.approx(exact, rel=1e-12)
    rewards = token_rewards(scores, kl.k1, mask, kl_coef=beta)
    advantages, _ = gae(rewards, baseline, mask, gamma=1.0, lam=1.0)
    loss = _expected_policy_loss(logprobs, advantages, mask, weights)
    torch.testing.assert_close(gradient(loss, table), -gradient(objective, table), rtol=1e-12, atol=1e-14)


# -- the adaptive controller -------------------------------------------------------------------------------------------

TARGET = 6.0


def run(controller: FixedKL, updates: int = 6000, episodes: int = 64) -> list[float]:
    """KL after each update.

    For small β the policy that is best for reward − β · KL has a KL that goes as 1 / β² (rewards near normal); the
    policy moves a twentieth of the way there in an update, and each batch measures it with an error of 30 %.
    """
    rng = random.Random(0)
    kl, seen = 0.0, []
    for _ in range(updates):
        best = 0.375 / controller.kl_coef**2  # 6 nats at β = 0.25
        kl += 0.05 * (best - kl)
        seen.append(kl)
        controller.update(kl * rng.gauss(1, 0.3), episodes)
    return seen


@pytest.mark.parametrize("kl_coef", [0.1, 0.25, 0.8])
def test_it_settles_within_five_per_cent(kl_coef: float) -> None:
    controller = AdaptiveKL(kl_coef, target=TARGET, horizon=10_000)
    late = run(controller)[-1000:]
    assert sum(late) / len(late) == pytest.approx(TARGET, rel=0.05)
    assert min(late) > 0.85 * TARGET
    assert max(late) < 1.15 * TARGET
    assert controller.kl_coef == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize("make", [lambda: FixedKL(0.8), lambda: AdaptiveKL(0.8, target=0.6, horizon=10_000)])
def test_the_plant_alone_does_not_settle_there(make: Callable[[], FixedKL]) -> None:
    """A fixed weight stays at the KL of its own optimum, and another target leads elsewhere: 0.375 / 0.64 = 0.59."""
    late = run(make())[-1000:]
    assert sum(late) / len(late) == pytest.approx(0.59, rel=0.1)
