"""The composed reward, shared by PPO, GRPO and the evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tasks.core.sections.code_rule import CodeRule
from tasks.core.sections.section import Positive, Section

__all__ = ["LengthRule", "RewardParams"]


class LengthRule(Section):
    """Where the length rule is flat and how fast it falls."""

    target: Positive = Field(description="The wished-for number of words in the response.")
    tolerance: Positive = Field(description="At this many words off target the rule reaches 0; at target it is 1.")


class RewardParams(Section):
    """The reward of a response: a weighted sum of components."""

    weights: dict[str, float] = Field(
        min_length=1, description="Component → weight; a component not named is not computed."
    )
    combine: Literal["mean", "worst", "uncertainty"] = Field(
        "mean",
        description="How members of the reward model become one score: their mean, the least of them, or the mean less "
        "uncertainty_coef times their variance (Coste et al. 2023, arXiv 2310.02743, equations 3 to 5).",
    )
    uncertainty_coef: float = Field(
        0.5,
        ge=0,
        description="λ of `uncertainty`, for scores whose spread is 1; Coste et al. take 0.5 for best-of-n and 0.1 for "
        "PPO.",
    )
    length: LengthRule = Field(description="Parameters of the component `length`.")
    code: CodeRule | None = Field(None, description="Parameters of the component `code`; null where it has no weight.")
