"""Proximal policy optimisation: KL penalty in the reward, advantages from a value head, clipped losses.

The state is the prompt with the tokens so far, the action is the next token, and the score arrives with the last one.
With an environment the policy's turns are parts of one episode. Sources of each detail are in docs/ppo.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tasks.rl.advantages import action_mask, action_values, gae, leave_one_out, to_actions, token_rewards
from tasks.rl.algorithm import Experience, Metrics, ScoredRollout, regularised_loss
from tasks.rl.kl import AdaptiveKL, FixedKL
from tasks.rl.losses import StepLoss, policy_loss, value_loss
from tasks.rl.masking import explained_variance, whiten, zero_masked
from tasks.rl.policy import PolicyOutput

if TYPE_CHECKING:
    from tasks.config.rl import PPOParams

__all__ = ["PPO", "PPOExperience"]


@dataclass(frozen=True)
class PPOExperience(Experience):
    """Advantages are whitened over the whole rollout; returns are taken before that."""

    old_values: Tensor  # [B, A], 0 without a value function
    returns: Tensor  # [B, A]


class PPO:
    """Advantages by GAE, leave-one-out or the return, of rewards that hold the KL penalty; clipped losses."""

    def __init__(self, params: PPOParams, *, max_new_tokens: int, turn_gamma: float = 1.0) -> None:
        """Keep the parameters, the longest that a response can be, and the discount per turn of an environment."""
        self.params, self.max_new_tokens = params, max_new_tokens
        self.kl_controller = FixedKL(params.kl_coef)
        if params.kl_controller == "adaptive":
            self.kl_controller = AdaptiveKL(params.kl_coef, params.adaptive_kl_target, params.kl_horizon)
        over_turns = params.action == "turn"
        self._gamma = turn_gamma if over_turns else params.gamma
        self.return_gamma = 1.0 if over_turns else turn_gamma  # over turns as actions the returns discount

    def compute_advantages(self, scored: ScoredRollout) -> tuple[PPOExperience, Metrics]:
        """Compute token rewards with the KL penalty, and advantages and returns per action."""
        params, rollout, mask = self.params, scored.rollout, scored.rollout.response_mask
        kl_coef = self.kl_controller.kl_coef if params.kl_penalty == "reward" else 0.0
        per_token = token_rewards(scored.scores, scored.kl.k1, mask, kl_coef=kl_coef)
        valid = action_mask(mask, params.action)
        rewards = to_actions(per_token, mask, params.action)
        values = torch.zeros_like(rewards)
        if params.has_values:
            assert rollout.values is not None, "PPO needs a sampler with a value head"
            values = action_values(rollout.values, mask, params.action)
        counted = scored.counted(valid, params)
        advantages, returns = self._advantages(rewards, values, valid)
        experience = PPOExperience(
            **rollout.tokens_and_texts(),
            action_mask=counted,
            old_logprobs=rollout.logprobs,
            advantages=scored.policy_advantages(whiten(advantages, counted), valid, params, params.action),
            reference_logprobs=scored.reference_logprobs,
            old_values=values,
            returns=returns,
        )
        metrics = {
            "non_score_reward": -kl_coef * scored.sequence_kl.mean().item(),
            "total_reward": per_token.sum(1).mean().item(),
        }
        if params.has_values:
            metrics["explained_variance"] = explained_variance(values, returns, valid).item()
        return experience, metrics

    def _advantages(self, rewards: Tensor, values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages before whitening, and returns, each [B, A]; without a value function the values are 0."""
        params = self.params
        if params.advantage == "leave_one_out":
            totals = rewards.sum(1)
            baselined = leave_one_out(totals, params.samples_per_prompt).unsqueeze(1).expand(valid.shape)
            return zero_masked(baselined, valid), zero_masked(totals.unsqueeze(1).expand(valid.shape), valid)
        estimate = partial(gae, rewards, values, valid, gamma=self._gamma)
        advantages, returns = estimate(lam=params.lam if params.has_values else 1.0)
        return advantages, returns if params.value_lam is None else estimate(lam=params.value_lam)[1]

    def loss(self, output: PolicyOutput, micro_batch: PPOExperience, minibatch: PPOExperience) -> StepLoss:
        """Clipped policy loss per action, plus weighted value and KL losses, less weighted entropy."""
        params, response_mask, mask = self.params, micro_batch.response_mask, micro_batch.action_mask
        action_count = max(1, int(minibatch.action_mask.sum()))
        policy = policy_loss(
            to_actions(output.logprobs, response_mask, params.action),
            to_actions(micro_batch.old_logprobs, response_mask, params.action),
            micro_batch.advantages,
            mask,
            clip_range=params.clip_range,
            clip_range_high=params.clip_range_high,
            dual_clip=params.dual_clip,
            token_count=action_count,
        )
        weights, kl_coef = torch.full_like(output.logprobs, 1 / action_count), self.kl_controller.kl_coef
        step_loss = regularised_loss(
            policy, output, micro_batch, minibatch, params, kl_coef=kl_coef, kl_weights=weights
        )
        if not params.has_values:
            return step_loss
        value = value_loss(
            action_values(output.values, response_mask, params.action),
            micro_batch.old_values,
            micro_batch.returns,
            mask,
            value_clip_range=params.value_clip_range,
            token_count=action_count,
        )
        return StepLoss(step_loss.loss + params.value_coef * value.loss, (*step_loss.parts, value))

    def learning_rate(self, update: int, step: int) -> float:
        """Linear decay over updates, constant within one."""
        return self.params.learning_rate * (1 - update / self.params.updates)
