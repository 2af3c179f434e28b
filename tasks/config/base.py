"""Base class and field types of the sections of params.yaml, and the names in it that libraries read as well."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

__all__ = [
    "CHAT", "ENVIRONMENT", "EXTERNAL_COMPONENTS", "LEARNED", "AnswerPattern", "Fraction", "LearningRate", "Positive",
    "Section", "check_minibatches",
]  # fmt: skip

LEARNED = "learned"
"""The component of the reward that the trained reward model computes."""

ENVIRONMENT = "environment"
"""The component of the reward that an environment gives."""

EXTERNAL_COMPONENTS = frozenset({ENVIRONMENT})
"""Components that come with the responses, such as an environment's reward; all others are rules."""

CHAT = "chat"
"""The template of a pretrained reward model that means its tokenizer's own chat template."""

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
LearningRate = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A section of params.yaml: an unknown key is an error, and values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def check_minibatches(prompts_per_update: int, samples_per_prompt: int, minibatches: int) -> None:
    """Check that a rollout divides into equal minibatches."""
    batch = prompts_per_update * samples_per_prompt
    if batch % minibatches:
        raise ValueError(f"minibatches {minibatches} must divide the {batch} responses of an update")


def _check_one_group(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from error
    if groups != 1:
        raise ValueError(f"needs one group, which is the answer, for example `#### (.+)`; this has {groups}")
    return pattern


AnswerPattern = Annotated[str, AfterValidator(_check_one_group)]
"""A regular expression that extracts one answer from a text."""
