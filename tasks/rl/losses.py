"""The losses of PPO and GRPO, and the log-probabilities and entropies they are made of.

Every loss is a sum over this micro-batch's tokens, weighted by counts of the whole optimiser step. So the losses of the
micro-batches add up to that of the step, and their gradients and metrics too, however it was split.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tasks.rl.kl import kl_estimates
from tasks.rl.masking import masked_sum, zero_masked

__all__ = [
    "PolicyLoss", "StepLoss", "cispo_loss", "entropy_from_logits", "entropy_sum", "kl_loss", "logprobs_from_logits",
    "policy_loss", "response_means", "token_weights", "value_loss",
]  # fmt: skip

LossType = Literal["grpo", "bnpo", "dapo", "dr_grpo", "cispo"]

MAX_LOG_RATIO = 20.0  # e^20 = 4.9e8: far beyond any use, and finite when squared in float32 (e^89 is not)


@dataclass(frozen=True, eq=False)
class Sums:
    """Detached sums over tokens, and `…_max`, the largest; they add up over micro-batches and ranks."""

    def __add__(self, other: Self) -> Self:
        merged = {}
        for name in (field.name for field in fields(self)):
            own, others = getattr(self, name).detach(), getattr(other, name).detach()
            merged[name] = torch.maximum(own, others) if name.endswith("_max") else own + others
        return type(self)(**merged)

    def metrics(self) -> dict[str, float]:
        """The metrics to log, as numbers."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class PolicyLoss(Sums):
    """Policy loss and statistics of the ratios ρ = π / π_old, as scalars: all but `loss` are detached sums.

    Sums of ρ − 1 and not of ρ, so that the variance of ratios near 1 survives rounding.
    """

    loss: Tensor  # to differentiate; in a sum of two it is detached, so call backward on each part first
    tokens: Tensor  # how many tokens counted
    clipped: Tensor  # number of them without gradient because of clipping, or with a weight that was cut
    log_ratio_squares: Tensor
    ratio_minus_one: Tensor
    ratio_minus_one_squares: Tensor
    ratio_max: Tensor

    def metrics(self) -> dict[str, float]:
        """Numbers to log, clip fraction and KL as in openai/lm-human-preferences.

        `clip_fraction`: share of tokens where the clipped term is the larger loss. `approx_kl`: ½ · mean (log ρ)²,
        nats per token, which is k2 for KL(π_old ‖ π). `ratio_mean`: its expectation under π_old is 1, so a mean far
        from 1 says that the two policies hardly overlap. `ratio_var`: the biased variance.
        """
        tokens = self.tokens.clamp_min(1)  # all responses may be masked
        mean = self.ratio_minus_one / tokens
        return {
            "policy_loss": self.loss.item(),
            "clip_fraction": (self.clipped / tokens).item(),
            "approx_kl": (self.log_ratio_squares / tokens / 2).item(),
            "ratio_mean": (1 + mean).item(),
            "ratio_var": (self.ratio_minus_one_squares / tokens - mean**2).clamp_min(0).item(),
            "ratio_max": self.ratio_max.item(),
        }


@dataclass(frozen=True, eq=False)
class ValueLoss(Sums):
    """A value loss (see `PolicyLoss`): `clipped` counts the tokens where the clipped value is further from the return,
    so that no gradient flows."""

    loss: Tensor
    tokens: Tensor
    clipped: Tensor

    def metrics(self) -> dict[str, float]:
        return {"value_loss": self.loss.item(), "value_clip_fraction": (self.clipped / self.tokens.clamp_min(1)).item()}


@dataclass(frozen=True, eq=False)
class KLLoss(Sums):
    """A KL loss (see `PolicyLoss`)."""

    loss: Tensor

    def metrics(self) -> dict[str, float]:
        return {"kl_loss": self.loss.item()}


@dataclass(frozen=True, eq=False)
class EntropySum(Sums):
    """Sum of token entropies, and the number of tokens."""

    total: Tensor
    tokens: Tensor

    def metrics(self) -> dict[str, float]:
        """Nats per token."""
        return {"entropy": self.total.item() / int(self.tokens)}


@dataclass(frozen=True, eq=False)
class StepLoss:
    """Loss of a micro-batch, to differentiate, and the parts from which metrics of the whole step come."""

    loss: Tensor
    parts: tuple[Sums, ...]

    def __add__(self, other: StepLoss) -> StepLoss:
        parts = tuple(one + another for one, another in zip(self.parts, other.parts, strict=True))
        return StepLoss(self.loss.detach() + other.loss.detach(), parts)

    def metrics(self) -> dict[str, float]:
        return {name: value for part in self.parts for name, value in part.metrics().items()}


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip_range: float | None,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    token_count: int = 1,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """Σ w · max(−A · ρ, −A · clip(ρ, 1 − ε, 1 + ε_high)) / token_count, with ρ = exp(logp − logp_old), |log ρ| ≤ 20.

    With a dual clip c, the term is at most −A · c where A < 0: min(max(…), −A · c).

    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7, as a loss; per token as in Ziegler et al. 2019.
    The cut keeps the loss of a failed update finite, so that the cause is reported as a ratio and not as NaN. All
    tensors are [B, T]; gradients flow through `logprobs` alone.

    Args:
        clip_range: ε; None for no clipping: the plain policy gradient, which is A2C's where ρ = 1.
        clip_range_high: ε_high, Yu et al. 2025 (DAPO, arXiv 2503.14476), section 3.1; None for ε.
        dual_clip: c > 1 + ε_high, Ye et al. 2020 (arXiv 1912.09729), which is TRL's `delta` (INTELLECT-2, arXiv
            2505.07291); None for none.
        token_count: tokens that count in the whole optimiser step, all micro-batches and ranks together.
        weights: w; None for 1. Those of `token_weights` hold the counts, so token_count is then 1.

    Raises:
        ValueError: token_count is not above 0, or the shapes do not fit.
    """
    _check_count(token_count)
    log_ratio = _log_ratio(logprobs, old_logprobs, response_mask)
    ratio = log_ratio.exp()
    advantage = zero_masked(advantages.detach(), response_mask)
    unclipped = -advantage * ratio
    terms = unclipped
    if clip_range is not None:
        high = clip_range if clip_range_high is None else clip_range_high
        terms = torch.maximum(unclipped, -advantage * ratio.clamp(1 - clip_range, 1 + high))
    if dual_clip is not None:
        terms = torch.where(advantage < 0, torch.minimum(terms, -advantage * dual_clip), terms)
    total = (terms if weights is None else zero_masked(terms * weights, response_mask)).sum() / token_count
    return _with_statistics(total, terms != unclipped, log_ratio.detach(), response_mask)


def cispo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    max_ratio: float,
    weights: Tensor,
) -> PolicyLoss:
    """Σ w · −A · min(ρ, max_ratio) · log π, where the ratio is a constant: every token keeps its gradient.

    Source: MiniMax 2025 (CISPO, arXiv 2506.13585), without lower bound as there. Arguments as in
    `policy_loss`; `clipped` counts the tokens whose ratio was cut.
    """
    log_ratio = _log_ratio(logprobs, old_logprobs, response_mask).detach()
    ratio = log_ratio.exp()
    factors = zero_masked(-advantages.detach() * ratio.clamp(max=max_ratio) * weights, response_mask)
    loss = (factors * zero_masked(logprobs, response_mask)).sum()
    return _with_statistics(loss, ratio > max_ratio, log_ratio, response_mask)


def _with_statistics(loss: Tensor, clipped: Tensor, log_ratio: Tensor, response_mask: Tensor) -> PolicyLoss:
    ratio = log_ratio.exp()
    ratio_minus_one = ratio - 1
    return PolicyLoss(
        loss=loss,
        tokens=response_mask.sum(),
        clipped=masked_sum(clipped, response_mask),
        log_ratio_squares=masked_sum(log_ratio**2, response_mask),
        ratio_minus_one=masked_sum(ratio_minus_one, response_mask),
        ratio_minus_one_squares=masked_sum(ratio_minus_one**2, response_mask),
        ratio_max=zero_masked(ratio, response_mask).max(),
    )


def response_means(logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """Mean log-probability of each response's tokens, at each of them, [B, T], 0 where masked.

    As log-probabilities of `policy_loss` they give all tokens of a response the ratio (π(y|x) / π_old(y|x))^(1/|y|).

    Source: Zheng et al. 2025 (GSPO, arXiv 2507.18071), equation 7.
    """
    means = masked_sum(logprobs, response_mask, dim=1) / response_mask.sum(1).clamp_min(1)
    return zero_masked(means.unsqueeze(1).expand(response_mask.shape), response_mask)


def kl_loss(
    logprobs: Tensor, old_logprobs: Tensor, reference_logprobs: Tensor, response_mask: Tensor, *, weights: Tensor
) -> KLLoss:
    """Σ w · ρ · k3, with ρ = π / π_old, k3 = e^(−Δ) − 1 + Δ and Δ = log π − log π_ref.

    With the factor ρ, through which the gradient flows too, its gradient is that of KL(π ‖ π_ref); that of k3 alone is
    another, see `tasks.rl.kl.KLEstimates`. All tensors are [B, T]; gradients flow through `logprobs` alone.

    Source: Shao et al. 2024 (arXiv 2402.03300), equation 4; the factor: DeepSeek-V3.2 (arXiv 2512.02556).
    """
    ratio = _log_ratio(logprobs, old_logprobs, response_mask).exp()
    k3 = kl_estimates(logprobs, reference_logprobs, response_mask).k3
    return KLLoss(masked_sum(ratio * k3 * weights, response_mask))


def token_weights(
    response_mask: Tensor, loss_type: LossType, *, responses: int, tokens: int, max_new_tokens: int
) -> Tensor:
    """Weight w [B, T] of each token in the loss of an optimiser step, 0 where masked.

        grpo          1 / (|y| · responses)               mean within a response, then over responses
        dr_grpo       1 / (responses · max_new_tokens)    no division by what the policy can change
        the others    1 / tokens                          mean over all tokens

    Source: grpo: Shao et al. 2024 (arXiv 2402.03300), equation 3; dapo: Yu et al. 2025 (arXiv 2503.14476), equation 8;
    dr_grpo: Liu et al. 2025 (arXiv 2503.20783), section 3.2. TRL's bnpo is dapo over a micro-batch; here a split into
    micro-batches changes nothing.

    Args:
        responses: in the whole optimiser step, all micro-batches and ranks together, as are `tokens`.
    """
    lengths = response_mask.sum(1, keepdim=True)
    totals = {"grpo": lengths * responses, "dr_grpo": torch.full_like(lengths, responses * max_new_tokens)}
    total = totals.get(loss_type, torch.full_like(lengths, tokens))
    return zero_masked((1 / total).expand(response_mask.shape), response_mask)


def entropy_sum(entropy: Tensor, response_mask: Tensor) -> EntropySum:
    """Sum the entropies [B, T] of the tokens that count."""
    return EntropySum(masked_sum(entropy, response_mask), response_mask.sum())


def _log_ratio(logprobs: Tensor, old_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    return zero_masked(logprobs - old_logprobs.detach(), response_mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    *,
    value_clip_range: float | None,
    token_count: int,
) -> ValueLoss:
    """½ · Σ max((V − R)², (V_clip − R)²) / token_count, with V_clip = V_old + clip(V − V_old, ±c).

    The factor ½ is part of the loss; `ppo.value_coef` comes on top.

    Source: openai/lm-human-preferences, train_policy.py::PPOTrainer.loss (not in the PPO paper). All tensors are
    [B, T]; gradients flow through `values` alone.

    Args:
        returns: advantages before whitening + old values.
        value_clip_range: c; None for no clipping.
        token_count: tokens that count in the whole optimiser step, all micro-batches and ranks together.

    Raises:
        ValueError: token_count is not above 0, or the shapes do not fit.
    """
    _check_count(token_count)
    value = zero_masked(values, response_mask)
    old_value = zero_masked(old_values.detach(), response_mask)
    target = zero_masked(returns.detach(), response_mask)
    unclipped = clipped = (value - target) ** 2
    if value_clip_range is not None:
        clipped_values = old_value + (value - old_value).clamp(-value_clip_range, value_clip_range)
        clipped = (clipped_values - target) ** 2
    return ValueLoss(
        loss=torch.maximum(unclipped, clipped).sum() / token_count / 2,
        tokens=response_mask.sum(),
        clipped=masked_sum(clipped > unclipped, response_mask),
    )


def entropy_from_logits(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """−Σ_v p_v · log p_v of p = softmax(logits / temperature), in nats, [..., V] → [...], in float32 or wider.

    The logits must be finite. A row of the batch at a time, because each step needs tensors of the logits' size.
    """
    if logits.dim() > 2:
        return torch.stack([entropy_from_logits(row, temperature) for row in logits])
    logits = _scale_logits(logits, temperature)
    shifted = logits - logits.detach().amax(-1, keepdim=True)
    weights = shifted.exp()
    total = weights.sum(-1)
    # With w = e^s and p = w / Σw: −Σ p·log p = log Σw − Σ w·s / Σw. In place, unless a gradient needs the factors.
    products = weights * shifted if shifted.requires_grad else weights.mul_(shifted)
    return total.log() - products.sum(-1) / total


def logprobs_from_logits(
    logits: Tensor, tokens: Tensor, temperature: float, *, inplace_backward: bool = False
) -> Tensor:
    """log softmax(logits / temperature) at the tokens: [B, T, V] and [B, T] → [B, T], in float32 or wider.

    Temperature belongs here: the policy that sampled is softmax(logits / temperature), so that is the policy to train
    and to compare with the reference (openai/lm-human-preferences, policy.py; Huang et al. 2023).

    A row of the batch at a time, and the backward pass computes the softmax again instead of keeping it: all that it
    adds is the gradient of the logits' size (torch's `log_softmax` and `gather` peak at about five times that). With
    `inplace_backward` the gradient may be written over the logits, which nothing must read afterwards.
    """
    return _Logprobs.apply(logits, tokens, temperature, inplace_backward)  # type: ignore[no-untyped-call]


class _Logprobs(torch.autograd.Function):
    """See `logprobs_from_logits`. ∂ log p_token / ∂ logit_v = ([v = token] − p_v) / temperature."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, inplace_backward: bool) -> Tensor:
        norm = torch.stack([torch.logsumexp(_scale_logits(row, temperature), dim=-1) for row in logits])
        ctx.save_for_backward(logits, tokens, norm)
        ctx.temperature, ctx.overwrite = temperature, inplace_backward
        return _at_least_float32(logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)) / temperature - norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, tokens, norm = ctx.saved_tensors
        scale = (grad / ctx.temperature).unsqueeze(-1)
        grad_logits = _scale_logits(logits, ctx.temperature)
        if grad_logits is logits and not ctx.overwrite:
            grad_logits = logits.clone()
        grad_logits.sub_(norm.unsqueeze(-1)).exp_().mul_(-scale)
        grad_logits.scatter_add_(-1, tokens.unsqueeze(-1), scale)
        return grad_logits, None, None, None


def _at_least_float32(tensor: Tensor) -> Tensor:
    """At least float32: half-precision log-probabilities are off by more than a policy moves in one update."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _scale_logits(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature; at 1 without the copy."""
    return _at_least_float32(logits) if temperature == 1 else _at_least_float32(logits) / temperature


def _check_count(token_count: int) -> None:
    if token_count <= 0:
        raise ValueError(f"token_count must be the step's number of tokens that count, above 0, got {token_count}")
