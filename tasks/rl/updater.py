"""PPO update of the policy: epochs of clipped steps on one rollout, each checked before it is applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tasks.core import distributed
from tasks.core.errors import TrainingError
from tasks.rl.advantages import action_values, to_actions
from tasks.rl.hacking import format_samples
from tasks.rl.losses import PolicyLoss, ValueLoss, policy_loss, value_loss
from tasks.rl.masking import masked_sum
from tasks.rl.policy import Experience, Policy

if TYPE_CHECKING:
    from tasks.config.training import PPOParams

__all__ = ["Metrics", "PPOUpdate"]

ADAM_EPSILON = 1e-5  # Huang et al., detail on Adam: PyTorch's default differs from the original's in effect
MAX_MEAN_RATIO = 10.0  # a rollout whose policy has moved this far cannot be corrected by importance weights

Metrics = dict[str, float]


class PPOUpdate:
    """PPO update with Adam on the trainable parameters; `decode` is for error messages, which show the responses."""

    def __init__(self, policy: Policy, params: PPOParams, decode: Callable[[Sequence[int]], str]) -> None:
        self.policy, self.params, self._decode = policy, params, decode
        self.optimizer = torch.optim.Adam(
            policy.trainable_parameters().values(), lr=params.learning_rate, eps=ADAM_EPSILON
        )

    def __call__(self, experience: Experience, learning_rate: float, generator: torch.Generator) -> Metrics:
        """Run several epochs of clipped steps on one rollout; stop early once the KL reaches its target.

        Raises:
            TrainingError: a loss or gradient is not finite, or the policy has moved out of reach of its rollouts.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        size = len(experience) // self.params.minibatches
        steps: list[Metrics] = []
        for _ in range(self.params.epochs):
            order = torch.randperm(len(experience), generator=generator)
            for rows in torch.split(order, size):
                steps.append(self.step(experience.select(rows)))
                if steps[-1]["approx_kl"] > self.params.target_kl:
                    return self._summary(steps, learning_rate)
        return self._summary(steps, learning_rate)

    def step(self, minibatch: Experience) -> Metrics:
        """Take one step on the minibatch unless the KL is over its target; micro-batches only bound the memory."""
        self.optimizer.zero_grad()
        action_count = int(minibatch.action_mask.sum())
        shard = distributed.shard(range(len(minibatch)), "the size of ppo's minibatches")
        micro_batches = minibatch.select(torch.tensor(shard)).split(self.params.micro_batch_size)
        actor_loss, critic_loss, entropy = self._backward(next(micro_batches), action_count)
        for micro_batch in micro_batches:
            actor_part, critic_part, entropy_part = self._backward(micro_batch, action_count)
            actor_loss, critic_loss, entropy = (
                actor_loss + actor_part,
                critic_loss + critic_part,
                entropy + entropy_part,
            )
        distributed.all_reduce_gradients(self.policy.trainable_parameters().values())
        actor_loss, critic_loss = distributed.all_reduce_sum(actor_loss), distributed.all_reduce_sum(critic_loss)
        entropy = distributed.all_gather(entropy.reshape(1)).sum()
        token_count = int(minibatch.response_mask.sum())
        metrics = {"entropy": entropy.item() / token_count, **actor_loss.metrics(), **critic_loss.metrics()}
        if metrics["ratio_mean"] > MAX_MEAN_RATIO:
            raise TrainingError(
                f"the mean probability ratio is {metrics['ratio_mean']:.1f} (limit {MAX_MEAN_RATIO}): the policy has "
                "left its rollouts behind; lower ppo.learning_rate or ppo.epochs"
            )
        norm = torch.nn.utils.clip_grad_norm_(self.policy.trainable_parameters().values(), self.params.max_grad_norm)
        metrics["grad_norm"] = norm.item()
        self._check_finite(metrics, minibatch)
        if metrics["approx_kl"] <= self.params.target_kl:
            self.optimizer.step()
        return metrics

    def _summary(self, steps: list[Metrics], learning_rate: float) -> Metrics:
        means = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
        means["ratio_max"] = max(step["ratio_max"] for step in steps)
        steps_taken = sum(step["approx_kl"] <= self.params.target_kl for step in steps)
        return {**means, "learning_rate": learning_rate, "optimiser_steps": steps_taken}

    def _backward(self, micro_batch: Experience, action_count: int) -> tuple[PolicyLoss, ValueLoss, Tensor]:
        """Add the gradient of a micro-batch; the third value is its sum of token entropies."""
        logprobs, values, entropy = self.policy(micro_batch)
        mask = micro_batch.action_mask
        actor_loss = policy_loss(
            to_actions(logprobs, micro_batch.response_mask, self.params.action),
            micro_batch.old_logprobs,
            micro_batch.advantages,
            mask,
            clip_range=self.params.clip_range,
            token_count=action_count,
        )
        critic_loss = value_loss(
            action_values(values, micro_batch.response_mask, self.params.action),
            micro_batch.old_values,
            micro_batch.returns,
            mask,
            value_clip_range=self.params.value_clip_range,
            token_count=action_count,
        )
        loss: Tensor = actor_loss.loss + self.params.value_coef * critic_loss.loss
        loss.backward()  # type: ignore[no-untyped-call]
        return actor_loss, critic_loss, masked_sum(entropy, micro_batch.response_mask)

    def _check_finite(self, metrics: Metrics, minibatch: Experience) -> None:
        non_finite = {name: value for name, value in metrics.items() if not math.isfinite(value)}
        if not non_finite:
            return
        rows = [
            row for row in range(len(minibatch)) if not self._is_finite_alone(minibatch.select(torch.tensor([row])))
        ]
        prompts = self._texts(minibatch.prompts, minibatch.prompt_mask)
        responses = self._texts(minibatch.responses, minibatch.response_mask)
        source = f"from {len(rows)} of {len(minibatch)} responses: {format_samples(rows, prompts, responses)}"
        raise TrainingError(
            f"not finite: {non_finite}, {source if rows else 'from no single response'}; this step changed nothing; "
            "lower "
            "ppo.learning_rate, or look at the rewards of these samples"
        )

    def _texts(self, tokens: Tensor, mask: Tensor) -> list[str]:
        return [self._decode(ids[counts].tolist()) for ids, counts in zip(tokens, mask, strict=True)]

    def _is_finite_alone(self, sample: Experience) -> bool:
        """Whether the loss and the gradient of this response alone are finite."""
        self.optimizer.zero_grad()
        actor_loss, critic_loss, entropy = self._backward(sample, 1)
        gradients = [weight.grad for weight in self.policy.trainable_parameters().values() if weight.grad is not None]
        return all(
            bool(torch.isfinite(value).all()) for value in (actor_loss.loss, critic_loss.loss, entropy, *gradients)
        )
