"""The over-optimisation curve."""

from __future__ import annotations

from pydantic import Field

from tasks.core.sections.section import Positive, Section

__all__ = ["OveroptimisationParams"]


class OveroptimisationParams(Section):
    """Proxy and gold reward of policy snapshots, and of best-of-n (Gao et al. 2022)."""

    prompts: Positive = Field(description="How many held-out prompts.")
    samples_per_prompt: int = Field(ge=2, description="SFT responses per prompt: best-of-n goes up to this n.")
    samples_per_policy: Positive = Field(
        4, description="Responses per prompt of each policy: with more of them, its gain is known more closely."
    )
    batch_size: Positive = Field(description="Prompts per batch.")
    bootstrap_samples: Positive = Field(description="Resamples of the prompts for each 95 % interval.")
