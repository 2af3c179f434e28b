"""The reward model."""

from __future__ import annotations

from pydantic import Field

from tasks.core.sections.section import Positive, Rate, Section

__all__ = ["RewardModelParams"]


class RewardModelParams(Section):
    """Bradley–Terry reward model: a linear head on the SFT model."""

    members: Positive = Field(
        1,
        description="How many models, each with a seed of its own: an ensemble (Coste et al. 2023, arXiv 2310.02743; "
        "four do as well as five there), whose cost in training and scoring is that many times one model's.",
    )
    first_layer: int = Field(
        ge=0,
        description="Layers below this one stay as they are: no adapters there, so no gradient is computed for them.",
    )
    epochs: Positive = Field(description="Passes over the pairs.")
    batch_size: Positive = Field(description="Pairs per optimiser step.")
    learning_rate: Rate = Field(description="Peak learning rate of AdamW; linear decay.")
    max_length: Positive = Field(description="Texts are cut at this many tokens.")
    normalisation_samples: Positive = Field(
        description="Responses of the SFT policy on which the mean and spread of the raw reward are measured."
    )
