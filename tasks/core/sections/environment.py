"""The multi-turn environment."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tasks.core.sections.section import Positive, Section

__all__ = ["ENVIRONMENT", "EnvironmentParams"]

ENVIRONMENT = "environment"
"""Name of the environment's reward component in `reward.weights`."""


class EnvironmentParams(Section):
    """Multi-turn environment; without this section a response is a single text."""

    kind: Literal["service_bot", "reasoning_gym"] = Field(
        description="A scripted user with a task, or a question with a retry after a wrong answer."
    )
    max_turns: Positive = Field(
        description="A conversation ends after so many turns of the policy, whatever it earned."
    )
    gamma: float = Field(
        gt=0,
        le=1,
        description="Discount per turn of the policy, of the whole score: below 1, a positive one counts more early, "
        "and a negative one costs less late. So with gamma below 1 no component should be a cost; where one is, "
        "gamma belongs at 1.",
    )
