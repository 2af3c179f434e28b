"""DPO."""

from __future__ import annotations

from pydantic import Field

from tasks.core.sections.section import Positive, LearningRate, Section

__all__ = ["DPOParams"]


class DPOParams(Section):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290), by TRL."""

    max_pairs: Positive = Field(description="Train on at most this many pairs.")
    epochs: Positive = Field(description="Passes over the pairs.")
    batch_size: Positive = Field(description="Pairs per optimiser step.")
    learning_rate: LearningRate = Field(description="Peak learning rate of AdamW; linear decay.")
    beta: float = Field(gt=0, description="Strength of the pull to the reference.")
    max_length: Positive = Field(description="Prompt and response are cut at this many tokens.")
