"""The composed reward, shared by PPO, GRPO and the evaluation."""

from __future__ import annotations

from pydantic import Field

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
    length: LengthRule = Field(description="Parameters of the component `length`.")
