"""Base class and field types of the sections of params.yaml."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Fraction", "LearningRate", "Positive", "Section", "check_minibatches"]

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
