"""Interface between the trainer and its algorithms, PPO and GRPO."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from tasks.rewards.composition import RewardBatch
from tasks.rl.kl import KLController, KLEstimates, kl_estimates, per_sequence
from tasks.rl.losses import StepLoss
from tasks.rl.policy import PolicyOutput
from tasks.rl.rollout import Rollout, TokenBatch

if TYPE_CHECKING:
    from tasks.config.training import RLParams

__all__ = ["Algorithm", "Experience", "Metrics", "ScoredRollout"]

Metrics = dict[str, float]


@dataclass(frozen=True)
class ScoredRollout:
    """Responses of all ranks with what they earned."""

    rollout: Rollout
    reference_logprobs: Tensor  # [B, T]
    reward: RewardBatch
    scores: Tensor  # [B] the total reward, discounted over turns, less the penalty for a missing end token

    @cached_property
    def kl(self) -> KLEstimates:
        """Estimates of the KL to the reference, each [B, T]."""
        return kl_estimates(self.rollout.logprobs, self.reference_logprobs, self.rollout.response_mask)

    @cached_property
    def sequence_kl(self) -> Tensor:
        """KL to the reference (k1) of each response, [B], nats."""
        return per_sequence(self.kl.k1, self.rollout.response_mask)


@dataclass(frozen=True)
class Experience(TokenBatch):
    """Inputs of an update. An action is a token or a turn (A = T), or the whole response (A = 1)."""

    action_mask: Tensor  # [B, A]
    old_logprobs: Tensor  # [B, A]
    advantages: Tensor  # [B, A]

    def __len__(self) -> int:
        return self.responses.shape[0]

    def select(self, rows: Tensor) -> Self:
        """The given rows, in the given order."""
        values: dict[str, Any] = {}
        for name, value in vars(self).items():
            values[name] = value[rows] if isinstance(value, Tensor) else [value[row] for row in rows.tolist()]
        return type(self)(**values)

    def split(self, size: int) -> Iterator[Self]:
        """Consecutive pieces of at most `size` rows."""
        for rows in torch.split(torch.arange(len(self)), size):
            yield self.select(rows)


ExperienceT = TypeVar("ExperienceT", bound=Experience)


class Algorithm(Protocol[ExperienceT]):
    """Choice of advantages, loss, learning rate and control of the KL."""

    return_gamma: float
    """Discount per turn of a conversation's score."""

    @property
    def params(self) -> RLParams: ...

    @property
    def kl_controller(self) -> KLController: ...

    def compute_advantages(self, scored: ScoredRollout) -> tuple[ExperienceT, Metrics]:
        """Compute advantages, and metrics of the rollout."""

    def loss(self, output: PolicyOutput, micro_batch: ExperienceT, minibatch: ExperienceT) -> StepLoss:
        """Loss of a micro-batch as its part of the loss of the minibatch, which is one optimiser step."""

    def learning_rate(self, update: int, step: int) -> float:
        """Learning rate of an optimiser step of an update, both from 0."""
