"""Sampling, shared by all stages that generate."""

from __future__ import annotations

from pydantic import Field

from tasks.core.sections.section import Positive, Section

__all__ = ["GenerationParams"]


class GenerationParams(Section):
    """Sampling settings: plain sampling, so that what is trained is what is sampled."""

    max_new_tokens: Positive = Field(description="A response ends here at the latest.")
    temperature: float = Field(gt=0, description="Logits are divided by this, in sampling and in training alike.")
