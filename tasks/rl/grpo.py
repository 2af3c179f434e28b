"""Group-relative policy optimisation: scores standardised within a prompt's responses, KL to the reference in the loss.

Source: Shao et al. 2024 (arXiv 2402.03300). TRL's GRPOTrainer is the reference of the tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tasks.rl.advantages import group_advantages
from tasks.rl.algorithm import Experience, Metrics, ScoredRollout, regularised_loss
from tasks.rl.kl import FixedKL
from tasks.rl.losses import PolicyLoss, StepLoss, cispo_loss, policy_loss, response_means, token_weights
from tasks.rl.masking import zero_masked
from tasks.rl.policy import PolicyOutput

if TYPE_CHECKING:
    from tasks.config.rl import GRPOParams

__all__ = ["GRPO"]


class GRPO:
    """Advantages within the group; clipped policy loss plus β times the KL loss; no value function.

    An action is a token, and every token of a response has the response's advantage.
    """

    def __init__(self, params: GRPOParams, *, max_new_tokens: int, turn_gamma: float = 1.0) -> None:
        """Keep the parameters, the longest that a response can be, and the discount per turn of an environment."""
        self.params, self.max_new_tokens, self.return_gamma = params, max_new_tokens, turn_gamma
        self.kl_controller = FixedKL(params.kl_coef)

    def compute_advantages(self, scored: ScoredRollout) -> tuple[Experience, Metrics]:
        """Compute advantages within each prompt's group."""
        params, rollout, mask = self.params, scored.rollout, scored.rollout.response_mask
        scores = scored.scores
        if params.kl_penalty == "reward":
            scores = scores - self.kl_controller.kl_coef * scored.sequence_kl
        advantages = group_advantages(scores, params.samples_per_prompt, params.scale_rewards)
        per_token = zero_masked(advantages.unsqueeze(1).expand(mask.shape), mask)
        experience = Experience(
            **rollout.tokens_and_texts(),
            action_mask=scored.counted(mask, params),
            old_logprobs=rollout.logprobs,
            advantages=scored.policy_advantages(per_token, mask, params),
            reference_logprobs=scored.reference_logprobs,
        )
        return experience, {}

    def loss(self, output: PolicyOutput, micro_batch: Experience, minibatch: Experience) -> StepLoss:
        """Clipped policy loss, plus weighted KL loss, less weighted entropy."""
        weights = token_weights(
            micro_batch.loss_mask,
            self.params.loss_type,
            responses=len(minibatch),
            tokens=max(1, int(minibatch.loss_mask.sum())),
            max_new_tokens=self.max_new_tokens,
        )
        policy, kl_coef = self._policy_loss(output.logprobs, micro_batch, weights), self.kl_controller.kl_coef
        return regularised_loss(
            policy, output, micro_batch, minibatch, self.params, kl_coef=kl_coef, kl_weights=weights
        )

    def _policy_loss(self, logprobs: Tensor, batch: Experience, weights: Tensor) -> PolicyLoss:
        params, old_logprobs, mask = self.params, batch.old_logprobs, batch.loss_mask
        if params.loss_type == "cispo":
            max_ratio = 1 + (params.clip_range_high or 0)
            return cispo_loss(logprobs, old_logprobs, batch.advantages, mask, max_ratio=max_ratio, weights=weights)
        if params.importance_level == "sequence":
            logprobs, old_logprobs = response_means(logprobs, mask), response_means(old_logprobs, mask)
        return policy_loss(
            logprobs, old_logprobs, batch.advantages, mask, clip_range=params.clip_range,
            clip_range_high=params.clip_range_high, dual_clip=params.dual_clip, weights=weights,
        )  # fmt: skip

    def learning_rate(self, update: int, step: int) -> float:
        """Linear decay over optimiser steps, as by transformers' trainers."""
        per_update = self.params.epochs * self.params.minibatches
        return self.params.learning_rate * (1 - (update * per_update + step) / (self.params.updates * per_update))
