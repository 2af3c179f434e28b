"""Supervised fine-tuning."""

from __future__ import annotations

from pydantic import Field

from tasks.core.sections.section import Positive, LearningRate, Section

__all__ = ["SFTParams"]


class SFTParams(Section):
    """Supervised fine-tuning on demonstrations."""

    max_examples: Positive = Field(description="Train on at most this many demonstrations.")
    max_validation_examples: Positive = Field(description="Measure the held-out loss on at most this many.")
    epochs: Positive = Field(description="Passes over the demonstrations.")
    batch_size: Positive = Field(description="Demonstrations per optimiser step.")
    learning_rate: LearningRate = Field(description="Peak learning rate of AdamW; linear decay.")
    max_length: Positive = Field(description="Prompt and response are cut at this many tokens.")
