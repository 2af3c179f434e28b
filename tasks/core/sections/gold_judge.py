"""The gold judge."""

from __future__ import annotations

from pydantic import Field

from tasks.core.sections.section import Positive, Rate, Section

__all__ = ["GoldJudgeParams"]


class GoldJudgeParams(Section):
    """Direct assessment: regression on mean ratings of texts that no other stage sees."""

    first_layer: int = Field(
        ge=0,
        description="Layers below this one stay as they are: no adapters there, so no gradient is computed for them.",
    )
    max_examples: Positive = Field(description="Train on at most this many rated texts.")
    epochs: Positive = Field(description="Passes over the texts.")
    batch_size: Positive = Field(description="Texts per optimiser step.")
    learning_rate: Rate = Field(description="Peak learning rate of AdamW; linear decay.")
    max_length: Positive = Field(description="Texts are cut at this many tokens.")
