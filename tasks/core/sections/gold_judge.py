"""Settings of the gold judge."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.core.sections.section import Positive, LearningRate, Section, Fraction

__all__ = ["GoldJudgeParams"]


class GoldJudgeParams(Section):
    """A judge fitted on people's ratings, or preferences, of texts that no other stage sees."""

    kind: Literal["rating", "preference"] = Field(
        "rating",
        description="What it learns: mean ratings (direct assessment; prepare.gold_share keeps texts for it), or which "
        "of two texts people prefer (Bradley–Terry; prepare.gold_pair_share keeps pairs for it).",
    )
    lora_first_layer: int = Field(
        ge=0,
        description="Layers below this one stay as they are: no adapters there, so no gradient is computed for them.",
    )
    max_examples: Positive = Field(description="Train on at most this many rated texts, or pairs.")
    shuffled_share: Fraction = Field(
        0.0,
        description="For each rated text, so many more whose words stand in random order, rated as low as the lowest: "
        "a judge trained only on people's texts scores word salad highly. Kind rating only.",
    )
    epochs: Positive = Field(description="Passes over the texts or pairs.")
    batch_size: Positive = Field(description="Texts, or pairs, per optimiser step.")
    learning_rate: LearningRate = Field(description="Peak learning rate of AdamW; linear decay.")
    max_length: Positive = Field(description="Texts are cut at this many tokens.")

    @model_validator(mode="after")
    def _check_shuffled(self) -> Self:
        if self.shuffled_share and self.kind != "rating":
            raise ValueError(f"shuffled_share {self.shuffled_share} needs kind rating, not {self.kind}; set it to 0")
        return self
