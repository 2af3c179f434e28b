"""Validation, de-duplication and splitting."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from tasks.core.sections.section import Positive, Section, Fraction

__all__ = ["PrepareParams"]


class PrepareParams(Section):
    """Validation, de-duplication and splitting."""

    prompt_words: Positive = Field(description="A rated text's first words, this many, become the prompt.")
    min_words: Positive = Field(description="Texts with fewer words are dropped, and counted.")
    max_words: Positive = Field(description="Texts with more words are dropped, and counted.")
    near_duplicate_threshold: float = Field(
        gt=0,
        le=1,
        description="Jaccard similarity of word trigrams from which two texts count as one; 1 looks for equal texts, "
        "which templated tasks need.",
    )
    validation_share: Fraction = Field(description="Share of texts held out for validation.")
    test_share: Fraction = Field(description="Share of texts held out for the final evaluation.")
    gold_share: Fraction = Field(description="Share of rated texts that only the gold judge sees.")
    gold_pair_share: Fraction = Field(
        0.0,
        description="Share of prompts whose preferences only the gold judge sees; 0 where it learns from ratings.",
    )
    max_preference_words: Positive | None = Field(
        None,
        description="Preferences are dropped, and counted, where prompt and response have more words on either side; "
        "null: kept at any length, for training cuts them by tokens.",
    )
    max_quarantine_share: Fraction = Field(description="The stage fails when more than this share of rows is malformed.")

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not self.prompt_words < self.min_words <= self.max_words:
            raise ValueError(
                f"need prompt_words < min_words <= max_words, got {self.prompt_words}, {self.min_words}, "
                f"{self.max_words}"
            )
        if self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share + test_share must leave texts to train on")
        return self
