"""GRPO."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from tasks.core.sections.section import Positive, LearningRate, Section, check_minibatches

__all__ = ["GRPOParams"]


class GRPOParams(Section):
    """Group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300), by TRL."""

    updates: Positive = Field(description="Rollout–update rounds.")
    prompts_per_update: Positive = Field(description="Prompts in each rollout.")
    samples_per_prompt: int = Field(ge=2, description="Responses per prompt: the group.")
    epochs: Positive = Field(description="Passes over each rollout.")
    minibatches: Positive = Field(description="Optimiser steps per pass.")
    learning_rate: LearningRate = Field(description="Peak learning rate of AdamW; linear decay.")
    clip_range: float = Field(gt=0, lt=1, description="ε of the clipped objective.")
    kl_coef: float = Field(ge=0, description="β: the weight of the KL loss to the reference.")
    missing_eos_penalty: float = Field(
        ge=0, description="Subtracted from the score of a response without an end token."
    )
    snapshot_every: Positive = Field(
        description="Keep the policy of every so many updates: they are the points of the over-optimisation curve."
    )

    @model_validator(mode="after")
    def _check_minibatches(self) -> Self:
        check_minibatches(self.prompts_per_update, self.samples_per_prompt, self.minibatches)
        return self
