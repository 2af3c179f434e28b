"""Proximal policy optimisation: KL penalty in the reward, advantages from a value head, clipped losses.

The state is the prompt with the tokens so far, the action is the next token, and the score arrives with the last one.
With an environment the policy's turns are parts of one episode. Sources of each detail are in docs/ppo.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from tasks.rl.advantages import action_mask, action_values, gae, leave_one_out, to_actions, token_rewards
from tasks.rl.algorithm import Experience, Metrics, ScoredRollout
from tasks.rl.kl import AdaptiveKL, FixedKL, KLController
from tasks.rl.losses import StepLoss, entropy_sum, policy_loss, value_loss
from tasks.rl.masking import explained_variance, whiten, zero_masked
from tasks.rl.policy import PolicyOutput

if TYPE_CHECKING:
    from tasks.config.training import PPOParams

__all__ = ["PPO", "PPOExperience"]


@dataclass(frozen=True)
class PPOExperience(Experience):
    """Advantages are whitened over the whole rollout; returns are taken before that."""

    old_values: Tensor  # [B, A]
    returns: Tensor  # [B, A]


class PPO:
    """Advantages by GAE or leave-one-out of rewards that hold the KL penalty; clipped policy and value losses."""

    def __init__(self, params: PPOParams, *, turn_gamma: float = 1.0) -> None:
        """Keep the parameters, and the discount per turn of an environment."""
        self.params = params
        self.kl_controller: KLController = FixedKL(params.kl_coef)
        if params.kl_controller == "adaptive":
            self.kl_controller = AdaptiveKL(params.kl_coef, params.adaptive_kl_target, params.kl_horizon)
        over_turns = params.action == "turn"
        self._gamma = turn_gamma if over_turns else params.gamma
        self.return_gamma = 1.0 if over_turns else turn_gamma  # over turns as actions the returns discount

    def compute_advantages(self, scored: ScoredRollout) -> tuple[PPOExperience, Metrics]:
        """Compute token rewards with the KL penalty, and advantages and returns per action."""
        params, rollout, kl_coef = self.params, scored.rollout, self.kl_controller.kl_coef
        mask = rollout.response_mask
        assert rollout.values is not None, "PPO needs a sampler with a value head"
        per_token = token_rewards(scored.scores, scored.kl.k1, mask, kl_coef=kl_coef)
        valid = action_mask(mask, params.action)
        values = action_values(rollout.values, mask, params.action)
        if params.advantage == "gae":
            rewards = to_actions(per_token, mask, params.action)
            advantages, returns = gae(rewards, values, valid, gamma=self._gamma, lam=params.lam)
        else:
            totals = per_token.sum(1)
            returns = zero_masked(totals.unsqueeze(1).expand(valid.shape), valid)
            baselined = leave_one_out(totals, params.samples_per_prompt)
            advantages = zero_masked(baselined.unsqueeze(1).expand(valid.shape), valid)
        experience = PPOExperience(
            **rollout.tokens_and_texts(),
            action_mask=valid,
            old_logprobs=to_actions(rollout.logprobs, mask, params.action),
            advantages=whiten(advantages, valid),
            old_values=values,
            returns=returns,
        )
        return experience, {
            "non_score_reward": -kl_coef * scored.sequence_kl.mean().item(),
            "total_reward": per_token.sum(1).mean().item(),
            "explained_variance": explained_variance(values, returns, valid).item(),
        }

    def loss(self, output: PolicyOutput, micro_batch: PPOExperience, minibatch: PPOExperience) -> StepLoss:
        """Clipped policy loss plus weighted value loss, per action."""
        params, response_mask, mask = self.params, micro_batch.response_mask, micro_batch.action_mask
        action_count = int(minibatch.action_mask.sum())
        policy = policy_loss(
            to_actions(output.logprobs, response_mask, params.action),
            micro_batch.old_logprobs,
            micro_batch.advantages,
            mask,
            clip_range=params.clip_range,
            token_count=action_count,
        )
        value = value_loss(
            action_values(output.values, response_mask, params.action),
            micro_batch.old_values,
            micro_batch.returns,
            mask,
            value_clip_range=params.value_clip_range,
            token_count=action_count,
        )
        parts = (entropy_sum(output.entropy, response_mask), policy, value)
        return StepLoss(policy.loss + params.value_coef * value.loss, parts)

    def learning_rate(self, update: int, step: int) -> float:
        """Linear decay over updates, constant within one."""
        return self.params.learning_rate * (1 - update / self.params.updates)
