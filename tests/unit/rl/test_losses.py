"""Losses, log-probabilities and entropies against numbers worked by hand."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tasks.rl.losses import (
    EntropySum,
    KLLoss,
    PolicyLoss,
    StepLoss,
    entropy_from_logits,
    entropy_sum,
    kl_loss,
    logprobs_from_logits,
    policy_loss,
    token_weights,
    value_loss,
)

NAN, INF = math.nan, math.inf


def f64(rows: list[list[float]], *, requires_grad: bool = False) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, requires_grad=requires_grad)


# -- policy ----------------------------------------------------------------------------------------------------------

RATIOS = [[1.5, 1.5, 0.5], [0.5, 1.1, 1.0]]
GAINS = f64([[1.0, -1.0, 1.0], [-2.0, 1.0, NAN]])
MASK = torch.tensor([[True, True, True], [True, True, False]])


def policy_example(**options: Any) -> tuple[Tensor, PolicyLoss]:
    logprobs = (f64(RATIOS).log() - 1).masked_fill(~MASK, NAN).requires_grad_()
    old = f64([[-1.0, -1.0, -1.0], [-1.0, -1.0, -INF]])
    return logprobs, policy_loss(logprobs, old, GAINS, MASK, clip_range=0.2, **options or {"token_count": 10})


def test_policy_loss_and_gradient_by_hand() -> None:
    # ε = 0.2. ρ = 1.5, A = +1: max(−1.5, −1.2) = −1.2, clipped.     ρ = 1.5, A = −1: max(1.5, 1.2) = 1.5.
    #          ρ = 0.5, A = +1: max(−0.5, −0.8) = −0.5.              ρ = 0.5, A = −2: max(1.0, 1.6) = 1.6, clipped.
    #          ρ = 1.1, A = +1: −1.1.                                Sum 0.3, over 10 tokens of the step: 0.03.
    logprobs, result = policy_example()
    assert result.loss.item() == pytest.approx(0.03, rel=1e-12)
    # ∂(−A·ρ)/∂logp = −A·ρ, over 10; 0 where clipped and where masked.
    result.loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.flatten().tolist() == pytest.approx([0, 0.15, -0.05, 0, -0.11, 0], abs=1e-12)


def test_policy_metrics_by_hand() -> None:
    # Over the 5 tokens that count. Clipped: 2. Mean ρ = 5.1/5. Deviations from 1.02: 0.48, 0.48, −0.52, −0.52, 0.08;
    # squares 0.4608 + 0.5408 + 0.0064 = 1.008; variance 1.008/5.
    approx_kl = (2 * math.log(1.5) ** 2 + 2 * math.log(0.5) ** 2 + math.log(1.1) ** 2) / 5 / 2
    expected = {"policy_loss": 0.03, "clip_fraction": 0.4, "approx_kl": approx_kl}
    expected |= {"ratio_mean": 1.02, "ratio_var": 0.2016, "ratio_max": 1.5}
    assert policy_example()[1].metrics() == pytest.approx(expected, rel=1e-7)  # counts are divided in float32


def test_the_largest_ratio_is_that_of_a_token_that_counts() -> None:
    # All real ratios are below 1, and padding has "ratio" 1.
    logprobs, mask = f64([[math.log(0.5), 0.0]]), torch.tensor([[True, False]])
    result = policy_loss(logprobs, f64([[0.0, 0.0]]), f64([[1.0, 1.0]]), mask, clip_range=0.2, token_count=1)
    assert result.ratio_max.item() == pytest.approx(0.5, rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_unchanged_policy_is_neither_clipped_nor_moved(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(3, 5, generator=generator, dtype=dtype) * 9
    gains = torch.randn(3, 5, generator=generator, dtype=dtype)
    mask = torch.ones(3, 5, dtype=torch.bool)
    result = policy_loss(logprobs, logprobs.clone(), gains, mask, clip_range=0.2, token_count=15)
    metrics = result.metrics()
    assert metrics.pop("policy_loss") == pytest.approx(-gains.mean().item(), rel=1e-5)
    assert metrics == {"clip_fraction": 0.0, "approx_kl": 0.0, "ratio_mean": 1.0, "ratio_var": 0.0, "ratio_max": 1.0}


def test_the_gradient_of_an_unchanged_policy_is_the_policy_gradient() -> None:
    # ρ = 1: ∂loss/∂logp = −A / N (Schulman et al. 2017, below equation 6).
    logprobs = f64([[-1.0, -2.0]], requires_grad=True)
    gains = f64([[3.0, -5.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    policy_loss(logprobs, logprobs.detach(), gains, mask, clip_range=0.2, token_count=2).loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-1.5, 2.5]]


@pytest.mark.parametrize(
    ("log_ratio", "kept"), [(50.0, 20.0), (-50.0, -20.0), (1000.0, 20.0), (19.5, 19.5), (-19.5, -19.5)]
)
def test_the_log_ratio_is_cut_at_twenty(log_ratio: float, kept: float) -> None:
    logprobs = torch.tensor([[log_ratio]], requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    result = policy_loss(logprobs, torch.zeros(1, 1), -torch.ones(1, 1), mask, clip_range=0.2, token_count=1)
    assert result.ratio_max.item() == pytest.approx(math.exp(kept), rel=1e-6)
    assert result.loss.item() == pytest.approx(max(math.exp(kept), 0.8), rel=1e-6)
    assert all(math.isfinite(value) for value in result.metrics().values())


def test_without_a_clip_range_the_loss_is_the_plain_policy_gradient() -> None:
    """ρ = 2 and ½ with A = 1 and −1: (−2 + ½) / 2; clipped to 1 ± 0.2 it would be (−1.2 + 0.8) / 2."""
    ratios, mask = f64([[2.0, 0.5]]).log(), torch.ones(1, 2, dtype=torch.bool)
    loss = policy_loss(ratios, torch.zeros_like(ratios), f64([[1.0, -1.0]]), mask, clip_range=None, token_count=2)
    assert loss.loss.item() == pytest.approx(-0.75)
    assert loss.clipped == 0


@pytest.mark.parametrize(
    ("log_ratios", "variance"),
    [
        # ρ = 1 ± 1e-4: variance 1e-8. As mean(ρ²) − mean(ρ)² in float32 it would be a multiple of 6e-8.
        ([math.log1p(1e-4), math.log1p(-1e-4)], pytest.approx(1e-8, rel=1e-2)),
        # Equal ratios: the two terms cancel, and for this one rounding in float32 leaves −2e-9.
        ([0.14, 0.14, 0.14], 0.0),
    ],
)
def test_the_variance_of_near_ratios_survives_float32_and_is_never_negative(log_ratios: Any, variance: Any) -> None:
    logprobs = torch.tensor([log_ratios])
    ones, zeros = torch.ones_like(logprobs), torch.zeros_like(logprobs)
    result = policy_loss(logprobs, zeros, ones, ones.bool(), clip_range=0.2, token_count=len(log_ratios))
    assert result.metrics()["ratio_var"] == variance


def test_a_sum_of_parts_holds_no_graph() -> None:
    logprobs, part = policy_example()
    total = part + part
    assert part.loss.requires_grad
    assert not any(tensor.requires_grad for tensor in vars(total).values())
    metrics = {name: tensor for name, tensor in vars(part).items() if name != "loss"}
    assert not any(tensor.requires_grad for tensor in metrics.values()), "metrics must not keep the graph alive"
    values = logprobs.detach().masked_fill(~MASK, 0).requires_grad_()
    critic = value_loss(values, GAINS, GAINS, MASK, value_clip_range=0.2, token_count=5)
    assert critic.loss.requires_grad
    assert not any(tensor.requires_grad for tensor in vars(critic + critic).values())


def test_what_the_rollout_left_is_constant() -> None:
    for loss in (partial(policy_loss, clip_range=0.2), partial(value_loss, value_clip_range=0.2)):
        trained, old, other = (f64([[x]], requires_grad=True) for x in (0.1, 0.0, 1.0))
        loss(trained, old, other, torch.tensor([[True]]), token_count=1).loss.backward()
        assert trained.grad is not None
        assert old.grad is None
        assert other.grad is None


@pytest.mark.parametrize("count", [0, -1])
def test_a_step_without_tokens_is_refused(count: int) -> None:
    one, mask = torch.ones(1, 1), torch.tensor([[False]])
    with pytest.raises(ValueError, match="token_count must be"):
        policy_loss(one, one, one, mask, clip_range=0.2, token_count=count)
    with pytest.raises(ValueError, match="token_count must be"):
        value_loss(one, one, one, mask, value_clip_range=0.2, token_count=count)


# -- GRPO ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("grpo", [[1 / 12, 1 / 12, 1 / 12], [1 / 8, 1 / 8, 0]]),  # lengths 3 and 2, of 4 responses
        ("bnpo", [[1 / 10] * 3, [1 / 10, 1 / 10, 0]]),  # 10 tokens in the step
        ("dapo", [[1 / 10] * 3, [1 / 10, 1 / 10, 0]]),
        ("dr_grpo", [[1 / 28] * 3, [1 / 28, 1 / 28, 0]]),  # 4 responses of up to 7 tokens
    ],
)
def test_token_weights_by_hand(loss_type: Any, expected: list[list[float]]) -> None:
    weights = token_weights(MASK, loss_type, responses=4, tokens=10, max_new_tokens=7)
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-6, atol=0)


def test_weighted_policy_loss_by_hand() -> None:
    """The terms of `policy_example`, each with its own weight; junk in a masked weight changes nothing."""
    logprobs, result = policy_example(weights=f64([[1.0, 2.0, 3.0], [0.5, 0.1, NAN]]))
    assert result.loss.item() == pytest.approx(-1.2 + 2 * 1.5 - 3 * 0.5 + 0.5 * 1.6 - 0.1 * 1.1, rel=1e-12)
    metrics, unweighted = result.metrics(), policy_example()[1].metrics()
    assert {**metrics, "policy_loss": 0.0} == {**unweighted, "policy_loss": 0.0}, "the ratios' statistics are the same"
    result.loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.flatten().tolist() == pytest.approx([0, 3.0, -1.5, 0, -0.11, 0], abs=1e-12)


def test_kl_loss_by_hand() -> None:
    # Δ = ln 2: k3 = ½ − 1 + ln 2; Δ = −ln 2: k3 = 2 − 1 − ln 2. With ρ = 1.5 and ½, and weights 2 and 3.
    logprobs = f64([[math.log(2) - 1, -math.log(2) - 1, NAN]], requires_grad=True)
    old = f64([[math.log(2) - 1 - math.log(1.5), -1.0, INF]])
    mask = torch.tensor([[True, True, False]])
    result = kl_loss(logprobs, old, f64([[-1.0, -1.0, NAN]]), mask, weights=f64([[2.0, 3.0, NAN]]))
    first, second = math.log(2) - 0.5, 1 - math.log(2)
    assert result.metrics() == {"kl_loss": pytest.approx(2 * 1.5 * first + 3 * 0.5 * second, rel=1e-12)}
    # ∂(ρ · k3) / ∂logp = ρ · (k3 + 1 − e^(−Δ)).
    result.loss.backward()
    assert logprobs.grad is not None
    expected = [2 * 1.5 * (first + 0.5), 3 * 0.5 * (second - 1), 0]
    assert logprobs.grad.flatten().tolist() == pytest.approx(expected, rel=1e-12)


def test_parts_of_a_step_add_up() -> None:
    entropies = f64([[1.0, 2.0, NAN]]), f64([[4.0, INF, NAN]])
    masks = torch.tensor([[True, True, False]]), torch.tensor([[True, False, False]])
    first, second = (
        StepLoss(torch.tensor(loss, requires_grad=True), (entropy_sum(entropy, mask), KLLoss(torch.tensor(loss))))
        for loss, entropy, mask in zip((1.0, 2.5), entropies, masks, strict=True)
    )
    total = first + second
    assert (total.loss.item(), total.loss.requires_grad) == (3.5, False)
    assert total.metrics() == {"entropy": pytest.approx(7 / 3), "kl_loss": 3.5}
    assert isinstance(total.parts[0], EntropySum)


# -- value -----------------------------------------------------------------------------------------------------------


def test_value_loss_and_gradient_by_hand() -> None:
    values = f64([[1.5, 1.5, 1.1], [0.5, NAN, INF]], requires_grad=True)
    old = f64([[1.0, 1.0, 1.0], [1.0, INF, NAN]])
    returns = f64([[2.0, 0.0, 2.0], [0.0, NAN, -INF]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    result = value_loss(values, old, returns, mask, value_clip_range=0.2, token_count=7)
    # c = 0.2. V = 1.5, R = 2: 0.25 against (1.2 − 2)² = 0.64, clipped.   V = 1.5, R = 0: 2.25 against 1.44.
    #          V = 1.1, R = 2: 0.81 both.                                 V = 0.5, R = 0: 0.25 against 0.64, clipped.
    # Sum 0.64 + 2.25 + 0.81 + 0.64 = 4.34; ½ · 4.34 / 7 = 0.31.
    assert result.metrics() == pytest.approx({"value_loss": 0.31, "value_clip_fraction": 0.5}, rel=1e-12)
    # ½ · ∂(V − R)²/∂V = V − R, over 7; 0 where clipped and where masked.
    result.loss.backward()
    assert values.grad is not None
    assert values.grad.flatten().tolist() == pytest.approx([0, 1.5 / 7, -0.9 / 7, 0, 0, 0], abs=1e-15)


# -- log-probabilities and entropy -----------------------------------------------------------------------------------

HALVES = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()


def test_logprobs_and_entropy_at_a_temperature_by_hand() -> None:
    # Logits may be shifted by anything: softmax does not see it.
    logits = (HALVES + torch.tensor([0.0, 1000.0], dtype=torch.float64)[:, None]).expand(2, 2, 3)
    result = logprobs_from_logits(logits, torch.tensor([[0, 1], [2, 0]]), 1.0)
    expected = [math.log(0.5), math.log(0.25), math.log(0.25), math.log(0.5)]
    assert result.flatten().tolist() == pytest.approx(expected, abs=1e-12)
    # Temperature 1/2 squares the odds: (4, 1, 1) / 6.
    result = logprobs_from_logits(HALVES.expand(1, 2, 3), torch.tensor([[0, 2]]), 0.5)
    assert result.flatten().tolist() == pytest.approx([math.log(4 / 6), math.log(1 / 6)], abs=1e-15)
    expected = -(4 / 6 * math.log(4 / 6) + 2 / 6 * math.log(1 / 6))
    assert entropy_from_logits(HALVES, 0.5).item() == pytest.approx(expected, rel=1e-14)


def test_logprob_gradient_by_hand() -> None:
    # ([v = token] − p_v) / temperature, times the incoming gradient 3; p = (0.5, 0.25, 0.25) at temperature 2.
    logits = (HALVES * 2).expand(1, 1, 3).clone().requires_grad_()
    (3 * logprobs_from_logits(logits, torch.tensor([[1]]), 2.0)).sum().backward()
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == pytest.approx([-0.75, 1.125, -0.375], abs=1e-15)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_their_gradient_agree_with_torch(temperature: float) -> None:
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(3, 6, 11, generator=generator, dtype=torch.float64) * 5
    tokens = torch.randint(0, 11, (3, 5), generator=generator)
    weight = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    ours, theirs = whole.clone().requires_grad_(), whole.clone().requires_grad_()
    result = logprobs_from_logits(ours[:, :-1], tokens, temperature)  # a slice: not contiguous
    expected = torch.log_softmax(theirs[:, :-1] / temperature, -1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    (result * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_half_precision_logits_are_summed_in_float32() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 3, 500, generator=generator).bfloat16().requires_grad_()
    tokens = torch.randint(0, 500, (2, 3), generator=generator)
    result = logprobs_from_logits(logits, tokens, 0.7)
    expected = torch.log_softmax(logits.detach().double() / 0.7, -1).gather(-1, tokens[..., None])[..., 0]
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    result.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16
    entropy = entropy_from_logits(logits.detach(), 0.7)
    distribution = torch.distributions.Categorical(logits=logits.detach().double() / 0.7)
    assert entropy.dtype == torch.float32
    torch.testing.assert_close(entropy.double(), distribution.entropy(), rtol=1e-5, atol=1e-5)


def test_entropy_by_hand() -> None:
    # ½·ln 2 + 2·¼·ln 4 = 1.5·ln 2; uniform over 4: ln 4; one token certain: 0.
    assert entropy_from_logits(HALVES).item() == pytest.approx(1.5 * math.log(2), rel=1e-14)
    assert entropy_from_logits(torch.zeros(4)).item() == pytest.approx(math.log(4), rel=1e-6)
    assert entropy_from_logits(torch.tensor([1e4, 0.0, 0.0])).item() == 0.0
    # Two equal tokens, whatever is added to the logits of a row.
    entropy = entropy_from_logits(torch.tensor([[0.0, 0.0], [1000.0, 1000.0]]))
    assert entropy.tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 3), (2, 1, 4, 3)])
def test_entropy_keeps_the_leading_shape(shape: tuple[int, ...]) -> None:
    entropy = entropy_from_logits(HALVES.expand(shape))
    assert entropy.shape == shape[:-1]
    torch.testing.assert_close(entropy, torch.full(shape[:-1], 1.5 * math.log(2), dtype=torch.float64))


def test_the_gradient_takes_the_place_of_the_logits_only_where_allowed() -> None:
    for overwrite in (False, True):
        leaf = torch.tensor([[[0.0, 1.0, 2.0]]], requires_grad=True)
        logits = leaf * 1
        before = logits.detach().clone()
        logprobs_from_logits(logits, torch.tensor([[1]]), 1.0, inplace_backward=overwrite).sum().backward()
        assert torch.equal(logits.detach(), before) is not overwrite
        expected = torch.tensor([0.0, 1.0, 0.0]) - before[0, 0].softmax(-1)
        torch.testing.assert_close(leaf.grad[0, 0], expected)
