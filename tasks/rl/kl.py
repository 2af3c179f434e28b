"""Estimates of KL(policy ‖ reference) from the log-probabilities of sampled tokens, and controllers of its penalty.

Source: Schulman 2020, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html), there with
r = reference / policy, so that log r = −Δ.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.rl.masking import masked_sum, zero_masked

__all__ = ["AdaptiveKL", "FixedKL", "KLEstimates", "kl_estimates", "per_sequence"]


@dataclass(frozen=True, eq=False)
class KLEstimates:
    """Three estimates per token, each [B, T] in nats, 0 where masked.

    Which one to use where:

    - k1 in the *reward*: the policy gradient is then the exact gradient of KL(policy ‖ reference).
    - k1 as a *loss*: its gradient vanishes in expectation.
    - k2 as a loss, on tokens sampled from the very policy: the exact gradient of KL(policy ‖ reference).
    - k3 as a loss: the gradient of the other divergence, KL(reference ‖ policy).
    - ρ · k3 as a loss, with the ratio ρ to the policy that sampled: the exact gradient of KL(policy ‖ reference).
    - k1 or k3 as a *number to look at*: both unbiased, k3 never negative; k2 is biased, little while the two are close.

    Source of the statements on gradients: Liu et al. 2025 (arXiv 2510.01555); each is a test here.
    """

    k1: Tensor
    k2: Tensor
    k3: Tensor


def kl_estimates(logprobs: Tensor, reference_logprobs: Tensor, response_mask: Tensor) -> KLEstimates:
    """k1 = Δ, k2 = Δ² / 2, k3 = e^(−Δ) − 1 + Δ, with Δ = log π(token) − log π_ref(token).

    Args:
        logprobs: [B, T] of the policy that sampled the tokens; the gradient, if any, flows through it.
        reference_logprobs: [B, T] at the same temperature.
    """
    delta = zero_masked(logprobs - reference_logprobs, response_mask)
    return KLEstimates(k1=delta, k2=delta**2 / 2, k3=torch.expm1(-delta) + delta)


def per_sequence(kl: Tensor, response_mask: Tensor) -> Tensor:
    """Σ_t over the tokens that count: [B, T] → [B], nats per response, the unit of `ppo.adaptive_kl_target`.

    By the chain rule the sum of k1 is an unbiased estimate of the KL between the distributions over whole responses.
    """
    return masked_sum(kl, response_mask, dim=1)


MAX_ERROR = 0.2  # openai/lm-human-preferences, train_policy.py::AdaptiveKLController


class FixedKL:
    """Constant coefficient β of the KL penalty."""

    def __init__(self, kl_coef: float) -> None:
        self.kl_coef = kl_coef

    def update(self, kl_per_sequence_mean: float, episodes: int) -> None:
        """Leave β as it is."""


class AdaptiveKL(FixedKL):
    """β ← β · (1 + clip(KL / target − 1, ±0.2) · n / horizon): proportional control of log β.

    KL is the sum of k1 over a response's tokens (verl and OpenRLHF take the mean), averaged over the batch's responses.

    Source: Ziegler et al. 2019 (arXiv 1909.08593), section 2.2; openai/lm-human-preferences, train_policy.py.

    Args:
        kl_coef: β at the start, above 0: a product never leaves 0.
        target: nats per response.
        horizon: episodes in which β changes by a factor of about e^±0.2 at the largest error; more than a fifth of a
            batch, or β could fall to 0.
    """

    def __init__(self, kl_coef: float, target: float, horizon: float) -> None:
        super().__init__(kl_coef)
        self.target, self.horizon = target, horizon

    def update(self, kl_per_sequence_mean: float, episodes: int) -> None:
        """Update β with the KL of a batch of responses."""
        error = min(max(kl_per_sequence_mean / self.target - 1, -MAX_ERROR), MAX_ERROR)
        self.kl_coef *= 1 + error * episodes / self.horizon
