"""LoRA settings, shared by all stages that train."""

from __future__ import annotations

from pydantic import Field

from tasks.core.sections.section import Positive, Section

__all__ = ["LoraParams"]


class LoraParams(Section):
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685), shared by all stages that train."""

    r: Positive = Field(description="Rank of the update.")
    alpha: Positive = Field(description="The update is scaled by alpha / r.")
    target_modules: str | tuple[str, ...] = Field(
        description="Names of the modules that SFT and the policies adapt, or 'all-linear'."
    )
    reward_model_modules: str | tuple[str, ...] = Field(
        description="The same for the reward model and the gold judge, which adapt their upper layers only."
    )
