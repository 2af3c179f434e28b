"""Policy update: epochs of optimiser steps on one rollout, each checked before it is applied."""

import math
import operator
from collections.abc import Iterator
from functools import reduce
from typing import Any, TypeVar

import torch

from tasks.core import distributed
from tasks.core.errors import TrainingError
from tasks.rl.algorithm import Algorithm, Experience, Metrics
from tasks.rl.hacking import format_samples
from tasks.rl.losses import StepLoss
from tasks.rl.masking import masked_sum
from tasks.rl.policy import Policy
from tasks.rl.ptx import Demonstrations
from tasks.rl.rollout import TokenBatch

__all__ = ["PolicyUpdate"]

TokenBatchT = TypeVar("TokenBatchT", bound=TokenBatch)

ADAM_EPSILON = 1e-5  # Huang et al., detail on Adam: PyTorch's default differs from the original's in effect
MAX_MEAN_RATIO = 10.0  # a rollout whose policy has moved this far cannot be corrected by importance weights


class PolicyUpdate:
    """Update of the trainable parameters by Adam and the algorithm's loss, with that of demonstrations where given."""

    def __init__(self, policy: Policy, algorithm: Algorithm[Any], demonstrations: Demonstrations | None = None) -> None:
        self.policy, self.algorithm, self.params = policy, algorithm, algorithm.params
        self.demonstrations = demonstrations
        self._max_kl = math.inf if self.params.target_kl is None else self.params.target_kl
        self.optimizer = torch.optim.Adam(
            policy.trainable_parameters().values(), lr=self.params.learning_rate, eps=ADAM_EPSILON
        )

    def __call__(self, experience: Experience, update: int, generator: torch.Generator) -> Metrics:
        """Run several epochs of clipped steps on one rollout; stop early once the KL reaches its target.

        Raises:
            TrainingError: a loss or gradient is not finite, or the policy has moved out of reach of its rollouts.
        """
        size = len(experience) // self.params.minibatches
        steps: list[Metrics] = []
        for _ in range(self.params.epochs):
            order = torch.randperm(len(experience), generator=generator)
            for rows in torch.split(order, size):
                for group in self.optimizer.param_groups:
                    group["lr"] = self._learning_rate(update, len(steps))
                drawn = self.demonstrations.draw(len(rows), generator) if self.demonstrations else None
                steps.append(self.step(experience.select(rows), drawn))
                if steps[-1]["approx_kl"] > self._max_kl:
                    return self._summary(steps, update)
        return self._summary(steps, update)

    def _learning_rate(self, update: int, step: int) -> float:
        """The algorithm's, after the warmup; Adam's first steps are as large for noise as for signal."""
        per_update = self.params.epochs * self.params.minibatches
        warmup = self.params.warmup_updates * per_update
        risen = (update * per_update + step + 1) / warmup if warmup else 1.0
        return self.algorithm.learning_rate(update, step) * min(1.0, risen)

    def step(self, minibatch: Experience, demonstrations: TokenBatch | None = None) -> Metrics:
        """Take one step on the minibatch unless the KL is over its target; micro-batches only bound the memory."""
        self.optimizer.zero_grad()
        micro_batches = self._micro_batches(minibatch)
        total = reduce(operator.add, (self._backward(micro_batch, minibatch) for micro_batch in micro_batches))
        ptx_loss = self._backward_demonstrations(demonstrations) if demonstrations else {}
        distributed.all_reduce_gradients(self.policy.trainable_parameters().values())
        metrics = StepLoss(total.loss, tuple(distributed.all_reduce_sum(part) for part in total.parts)).metrics()
        metrics |= ptx_loss
        if metrics["ratio_mean"] > MAX_MEAN_RATIO:
            raise TrainingError(
                f"the mean probability ratio is {metrics['ratio_mean']:.1f} (limit {MAX_MEAN_RATIO}): the policy has "
                f"left its rollouts behind; lower {self.params.stage}.learning_rate or {self.params.stage}.epochs"
            )
        norm = torch.nn.utils.clip_grad_norm_(self.policy.trainable_parameters().values(), self.params.max_grad_norm)
        metrics["grad_norm"] = norm.item()
        self._check_finite(metrics, minibatch)
        if metrics["approx_kl"] <= self._max_kl:
            self.optimizer.step()
        return metrics

    def _summary(self, steps: list[Metrics], update: int) -> Metrics:
        means = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
        means["ratio_max"] = max(step["ratio_max"] for step in steps)
        means["learning_rate"] = self._learning_rate(update, 0)
        means["optimiser_steps"] = sum(step["approx_kl"] <= self._max_kl for step in steps)
        return means

    def _micro_batches(self, batch: TokenBatchT) -> Iterator[TokenBatchT]:
        """Pieces of this rank's part of a batch."""
        shard = distributed.shard(range(len(batch)), f"the size of {self.params.stage}'s minibatches")
        return batch.select(torch.tensor(shard)).split(self.params.micro_batch_size)

    def _backward_demonstrations(self, batch: TokenBatch) -> Metrics:
        """Add the gradient of the weighted mean negative log-probability of the demonstrations' tokens."""
        assert self.demonstrations is not None
        count, losses = batch.response_mask.sum(), []
        for part in self._micro_batches(batch):
            loss = -masked_sum(self.policy.demonstration_logprobs(part), part.response_mask) / count
            (self.demonstrations.coef * loss).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        return {"ptx_loss": distributed.all_gather(torch.stack(losses)).sum().item()}

    def _backward(self, micro_batch: Experience, minibatch: Experience) -> StepLoss:
        output = self.policy(micro_batch, entropy_gradient=self.params.entropy_coef > 0)
        step_loss = self.algorithm.loss(output, micro_batch, minibatch)
        step_loss.loss.backward()  # type: ignore[no-untyped-call]
        return step_loss

    def _check_finite(self, metrics: Metrics, minibatch: Experience) -> None:
        non_finite = {name: value for name, value in metrics.items() if not math.isfinite(value)}
        if not non_finite:
            return
        rows = [row for row, sample in enumerate(minibatch.split(1)) if not self._is_finite_alone(sample)]
        samples = format_samples(rows, minibatch.prompt_texts, minibatch.texts)
        source = f"from {len(rows)} of {len(minibatch)} responses: {samples}" if rows else "from no single response"
        raise TrainingError(
            f"not finite: {non_finite}, {source}; this step changed nothing; lower {self.params.stage}.learning_rate, "
            "or look at the rewards of these samples"
        )

    def _is_finite_alone(self, sample: Experience) -> bool:
        """Whether the loss and the gradient of this response alone are finite."""
        self.optimizer.zero_grad()
        step_loss = self._backward(sample, sample)
        gradients = [weight.grad for weight in self.policy.trainable_parameters().values() if weight.grad is not None]
        finite_gradients = all(bool(gradient.isfinite().all()) for gradient in gradients)
        return finite_gradients and all(map(math.isfinite, step_loss.metrics().values()))
