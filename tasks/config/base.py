"""Base class and field types of the sections of params.yaml, and the names in it that libraries read as well."""

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

__all__ = [
    "CHAT", "ENVIRONMENT", "EXTERNAL_COMPONENTS", "LEARNED", "AnswerPattern", "Fraction", "LearningRate", "Positive",
    "Regex", "Section",
]  # fmt: skip

LEARNED = "learned"  # the component of the reward that the trained reward model computes
ENVIRONMENT = "environment"  # the one that an environment gives
EXTERNAL_COMPONENTS = frozenset({ENVIRONMENT})  # those that come with the responses; all others are rules
CHAT = "chat"  # as the template of a pretrained reward model: its tokenizer's own chat template

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
LearningRate = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A section of params.yaml: an unknown key and a number that is not finite are errors; values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _check_regex(pattern: str) -> str:
    try:
        return re.compile(pattern).pattern
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from error


def _check_one_group(pattern: str) -> str:
    if (groups := re.compile(pattern).groups) != 1:
        raise ValueError(f"needs one group, which is the answer, for example `#### (.+)`; this has {groups}")
    return pattern


Regex = Annotated[str, AfterValidator(_check_regex)]
AnswerPattern = Annotated[Regex, AfterValidator(_check_one_group)]
"""A regular expression that extracts one answer from a text."""
