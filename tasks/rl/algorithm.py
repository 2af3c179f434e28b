"""Interface between the trainer and its algorithms, PPO and GRPO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tasks.rewards.composition import RewardBatch
from tasks.rl.advantages import to_actions, top_entropy_tokens
from tasks.rl.kl import FixedKL, KLEstimates, kl_estimates, per_sequence
from tasks.rl.losses import PolicyLoss, StepLoss, entropy_sum, kl_loss
from tasks.rl.masking import masked_sum, zero_masked
from tasks.rl.mismatch import importance_weights
from tasks.rl.policy import PolicyOutput
from tasks.rl.rollout import Rollout, TokenBatch

if TYPE_CHECKING:
    from tasks.config.rl import RLParams, RolloutParams
    from tasks.rl.advantages import Action

__all__ = ["Algorithm", "Experience", "Metrics", "ScoredRollout", "regularised_loss", "replace_groups"]

Metrics = dict[str, float]


@dataclass(frozen=True)
class ScoredRollout:
    """Responses of all ranks with what they earned."""

    rollout: Rollout
    reference_logprobs: Tensor  # [B, T]
    reward: RewardBatch
    scores: Tensor  # [B] the total reward, discounted over turns, less the penalty for a missing end token
    entropies: Tensor | None = None  # [B, T] of the policy, where the tokens of the highest are chosen
    rollout_params: RolloutParams | None = None  # where an engine sampled

    @cached_property
    def kl(self) -> KLEstimates:
        """Estimates of the KL to the reference, each [B, T]."""
        return kl_estimates(self.rollout.logprobs, self.reference_logprobs, self.rollout.response_mask)

    @cached_property
    def sequence_kl(self) -> Tensor:
        """KL to the reference (k1) of each response, [B], nats."""
        return per_sequence(self.kl.k1, self.rollout.response_mask)

    def counted(self, action_mask: Tensor, params: RLParams) -> Tensor:
        """Mask [B, A] of the actions that count in the losses: with `mask_truncated`, none of a cut response."""
        return action_mask & self.rollout.has_eos.unsqueeze(1) if params.mask_truncated else action_mask

    def policy_advantages(
        self, advantages: Tensor, action_mask: Tensor, params: RLParams, action: Action = "token"
    ) -> Tensor:
        """Advantages [B, A] in the policy gradient: times importance weights where an engine sampled.

        0 at the tokens that `top_entropy_share` leaves without a policy gradient.
        """
        mask, engine_logprobs = self.rollout.response_mask, self.rollout.engine_logprobs
        if engine_logprobs is not None:
            assert self.rollout_params is not None, "an engine samples, so the trainer needs rollout_params"
            own, engine = (to_actions(each, mask, action) for each in (self.rollout.logprobs, engine_logprobs))
            advantages = advantages * importance_weights(own, engine, action_mask, self.rollout_params)
        if self.entropies is None:
            return advantages
        return zero_masked(advantages, top_entropy_tokens(self.entropies, mask, params.top_entropy_share))


def replace_groups(scored: ScoredRollout, extra: ScoredRollout, group: int, places: Mapping[int, int]) -> ScoredRollout:
    """The scored rollout with the responses to some prompts replaced (DAPO, arXiv 2503.14476, section 3.2).

    Args:
        group: responses to each prompt.
        places: position of a prompt → position of the prompt of `extra` that takes its place.
    """
    count = len(scored.scores)
    rows = torch.arange(count)
    for place, position in places.items():
        rows[place * group : (place + 1) * group] = torch.arange(group) + count + position * group
    merged: ScoredRollout = _merge(scored, extra, rows, scored.rollout.pad_token_id)
    return merged


def _merge(one: Any, other: Any, rows: Tensor, pad_id: int, name: str = "") -> Any:
    """These rows of one followed by the other: of tensors and lists, wherever they are in dicts and dataclasses."""
    if isinstance(one, Tensor):
        if one.dim() == 1:
            return torch.cat([one, other])[rows.to(one.device)]
        side = "left" if name in ("prompts", "prompt_mask") else "right"
        pad = pad_id if name in ("prompts", "responses") else 0
        widened = pad_sequence([*one, *other], batch_first=True, padding_value=pad, padding_side=side)
        return widened[rows.to(one.device)]
    if isinstance(one, list):
        return [(one + other)[row] for row in rows.tolist()]
    if isinstance(one, dict):
        return {key: _merge(value, other[key], rows, pad_id) for key, value in one.items()}
    if is_dataclass(one) and not isinstance(one, type):
        names = [field.name for field in fields(one)]
        merged = {name: _merge(getattr(one, name), getattr(other, name), rows, pad_id, name) for name in names}
        return replace(one, **merged)
    return one


@dataclass(frozen=True)
class Experience(TokenBatch):
    """Inputs of an update. An action is a token or a turn (A = T), or the whole response (A = 1)."""

    action_mask: Tensor  # [B, A]
    old_logprobs: Tensor  # [B, T] of the policy that sampled
    advantages: Tensor  # [B, A]
    reference_logprobs: Tensor  # [B, T]

    @property
    def loss_mask(self) -> Tensor:
        """True [B, T] at the tokens that count in the losses."""
        return self.response_mask & self.action_mask.any(1, keepdim=True)


ExperienceT = TypeVar("ExperienceT", bound=Experience)


class Algorithm(Protocol[ExperienceT]):
    """Choice of advantages, loss, learning rate and control of the KL."""

    return_gamma: float
    """Discount per turn of a conversation's score."""

    max_new_tokens: int
    """The longest that a response, or a turn of a conversation, can be."""

    @property
    def params(self) -> RLParams: ...

    @property
    def kl_controller(self) -> FixedKL: ...

    def compute_advantages(self, scored: ScoredRollout) -> tuple[ExperienceT, Metrics]:
        """Compute advantages, and metrics of the rollout."""

    def loss(self, output: PolicyOutput, micro_batch: ExperienceT, minibatch: ExperienceT) -> StepLoss:
        """Loss of a micro-batch as its part of the loss of the minibatch, which is one optimiser step."""

    def learning_rate(self, update: int, step: int) -> float:
        """Learning rate of an optimiser step of an update, both from 0."""


def regularised_loss(
    policy: PolicyLoss,
    output: PolicyOutput,
    micro_batch: Experience,
    minibatch: Experience,
    params: RLParams,
    *,
    kl_coef: float,
    kl_weights: Tensor,
) -> StepLoss:
    """Policy loss, plus β times the KL loss where it is the KL penalty, less the weighted mean entropy per token.

    Args:
        kl_weights: [B, T] of each token in the KL loss; its counts are those of the whole optimiser step.
    """
    mask, entropies = micro_batch.loss_mask, output.entropy
    entropy = masked_sum(entropies, mask) / minibatch.loss_mask.sum().clamp_min(1)
    total = policy.loss - params.entropy_coef * entropy
    parts = (entropy_sum(entropies, micro_batch.response_mask), policy)
    if params.kl_penalty == "reward":
        return StepLoss(total, parts)
    kl = kl_loss(output.logprobs, micro_batch.old_logprobs, micro_batch.reference_logprobs, mask, weights=kl_weights)
    return StepLoss(total + kl_coef * kl.loss, (*parts, kl))
