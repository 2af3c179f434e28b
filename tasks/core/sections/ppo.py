"""PPO."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.core.sections.section import Positive, LearningRate, Section, check_minibatches

__all__ = ["PPOParams"]


class PPOParams(Section):
    """Proximal policy optimisation (Schulman et al. 2017; Ziegler et al. 2019)."""

    updates: Positive = Field(description="Rollout–update rounds.")
    prompts_per_update: Positive = Field(description="Prompts in each rollout.")
    samples_per_prompt: Positive = Field(description="Responses sampled for each prompt.")
    epochs: Positive = Field(description="Passes over each rollout.")
    minibatches: Positive = Field(description="Optimiser steps per pass.")
    micro_batch_size: Positive = Field(
        description="Sequences per forward pass; changes memory and speed, never the gradient."
    )
    learning_rate: LearningRate = Field(description="Initial learning rate of Adam; annealed linearly to 0.")
    action: Literal["token", "turn", "response"] = Field(
        description="What counts as one action with a probability ratio of its own: each token, each turn of a "
        "conversation, or the whole response."
    )
    advantage: Literal["gae", "leave_one_out"] = Field(
        description="Generalised advantage estimation with a value function, or the return less the mean of the other "
        "responses to the prompt."
    )
    gamma: float = Field(
        gt=0, le=1, description="Discount of rewards over tokens; 1 treats the response as one episode."
    )
    lam: float = Field(ge=0, le=1, description="λ of generalised advantage estimation.")
    clip_range: float | None = Field(
        None, gt=0, lt=1, description="ε of the clipped objective; without it, no clipping."
    )
    value_clip_range: float | None = Field(
        None, gt=0, description="Maximum change of a value from the rollout's; without it, no clipping."
    )
    value_coef: float = Field(ge=0, description="Weight of the value loss.")
    max_grad_norm: float = Field(gt=0, description="Gradients are scaled down to this norm.")
    kl_coef: float = Field(ge=0, description="β: the weight of the per-token KL penalty in the reward.")
    kl_controller: Literal["fixed", "adaptive"] = Field(description="Whether β is fixed or adaptive.")
    adaptive_kl_target: float = Field(gt=0, description="Adaptive: nats per sequence to steer to.")
    kl_horizon: Positive = Field(description="Adaptive: episodes over which β can change by a factor of about e.")
    kl_budget: float | None = Field(
        None, gt=0, description="Training ends with the last policy whose KL, nats per response, was within this."
    )
    target_kl: float = Field(
        gt=0, description="The epochs of an update stop when the policy moved further than this, nats per action."
    )
    missing_eos_penalty: float = Field(
        ge=0, description="Subtracted from the score of a response without an end token."
    )
    checkpoint_every: Positive = Field(description="Updates between checkpoints from which an interrupted run goes on.")
    snapshot_every: Positive = Field(
        description="Keep the policy of every so many updates: they are the points of the over-optimisation curve."
    )

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        check_minibatches(self.prompts_per_update, self.samples_per_prompt, self.minibatches)
        episodes = self.prompts_per_update * self.samples_per_prompt
        if self.kl_controller == "adaptive" and not (self.kl_coef > 0 and 0.2 * episodes < self.kl_horizon):
            raise ValueError(
                f"the adaptive controller needs kl_coef above 0 (got {self.kl_coef}) and kl_horizon above a fifth of "
                f"the {episodes} responses of an update (got {self.kl_horizon})"
            )
        if self.action == "response" and self.gamma != 1:
            raise ValueError(f"action: response is one step without discount, so gamma must be 1, got {self.gamma}")
        if self.action == "turn" and (self.gamma != 1 or self.advantage != "gae"):
            raise ValueError(
                "action: turn is discounted by environment.gamma and estimates advantages turn by turn: set gamma to 1 "
                f"and advantage to gae, got {self.gamma} and {self.advantage}"
            )
        if self.advantage == "leave_one_out":
            if self.samples_per_prompt < 2:
                raise ValueError(
                    "advantage: leave_one_out compares a prompt's responses: set samples_per_prompt above 1"
                )
            if self.gamma != 1 or self.value_coef != 0:
                raise ValueError(
                    "advantage: leave_one_out has no value function and no discount: set gamma to 1 and value_coef "
                    f"to 0, got {self.gamma} and {self.value_coef}"
                )
        return self
