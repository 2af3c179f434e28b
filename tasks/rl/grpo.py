"""Group-relative policy optimisation: scores standardised within a prompt's responses, KL to the reference in the loss.

Source: Shao et al. 2024 (arXiv 2402.03300). TRL's GRPOTrainer is the reference of the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from tasks.rl.advantages import group_standardised
from tasks.rl.algorithm import Experience, Metrics, ScoredRollout
from tasks.rl.kl import FixedKL
from tasks.rl.losses import StepLoss, entropy_sum, kl_loss, policy_loss, token_weights
from tasks.rl.masking import zero_masked
from tasks.rl.policy import PolicyOutput

if TYPE_CHECKING:
    from tasks.config.training import GRPOParams

__all__ = ["GRPO", "GRPOExperience"]


@dataclass(frozen=True)
class GRPOExperience(Experience):
    """An action is a token, and every token of a response has the response's advantage."""

    reference_logprobs: Tensor  # [B, T]


class GRPO:
    """Advantages within the group; clipped policy loss plus β times the KL loss; no value function."""

    def __init__(self, params: GRPOParams, *, max_new_tokens: int, turn_gamma: float = 1.0) -> None:
        """Keep the parameters, the longest that a response can be, and the discount per turn of an environment."""
        self.params, self._max_new_tokens, self.return_gamma = params, max_new_tokens, turn_gamma
        self.kl_controller = FixedKL(params.kl_coef)

    def compute_advantages(self, scored: ScoredRollout) -> tuple[GRPOExperience, Metrics]:
        """Compute advantages within each prompt's group."""
        rollout, mask = scored.rollout, scored.rollout.response_mask
        advantages = group_standardised(scored.scores, self.params.samples_per_prompt)
        experience = GRPOExperience(
            **rollout.tokens_and_texts(),
            action_mask=mask,
            old_logprobs=rollout.logprobs,
            advantages=zero_masked(advantages.unsqueeze(1).expand(mask.shape), mask),
            reference_logprobs=scored.reference_logprobs,
        )
        return experience, {}

    def loss(self, output: PolicyOutput, micro_batch: GRPOExperience, minibatch: GRPOExperience) -> StepLoss:
        """Clipped policy loss plus weighted KL loss."""
        mask = micro_batch.response_mask
        weights = token_weights(
            mask,
            self.params.loss_type,
            responses=len(minibatch),
            tokens=int(minibatch.response_mask.sum()),
            max_new_tokens=self._max_new_tokens,
        )
        policy = policy_loss(
            output.logprobs,
            micro_batch.old_logprobs,
            micro_batch.advantages,
            mask,
            clip_range=self.params.clip_range,
            weights=weights,
        )
        kl = kl_loss(output.logprobs, micro_batch.old_logprobs, micro_batch.reference_logprobs, mask, weights=weights)
        parts = (entropy_sum(output.entropy, mask), policy, kl)
        return StepLoss(policy.loss + self.kl_controller.kl_coef * kl.loss, parts)

    def learning_rate(self, update: int, step: int) -> float:
        """Linear decay over optimiser steps, as by transformers' trainers."""
        per_update = self.params.epochs * self.params.minibatches
        return self.params.learning_rate * (1 - (update * per_update + step) / (self.params.updates * per_update))
