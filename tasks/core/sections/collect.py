"""The sources of rows."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.core.sections.pattern import AnswerPattern
from tasks.core.sections.section import Positive, Section

__all__ = ["CollectParams", "SourceParams"]


class SourceParams(Section):
    """One source of rows."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$", description="Names the data card.")
    kind: Literal["film_reviews", "hub", "local", "reasoning_gym", "service_bot"] = Field(
        description="Which reader to use."
    )
    row_type: Literal["prompts", "demonstrations", "preferences", "ratings"] = Field(description="The row type it yields.")
    id: str = Field(
        description="`package==version` for film_reviews, `owner/name` for hub, a path for local, "
        "a task name for reasoning_gym, wishes joined by commas for service_bot: `table,address,taxi`."
    )
    sha256: str = Field("", description="Checksum of the file, checked before it is read; required for film_reviews.")
    revision: str = Field("main", description="For hub: the branch, tag or commit.")
    subset: str | None = Field(None, description="For hub: the configuration name.")
    data_dir: str | None = Field(
        None, description="For hub: the folder of the dataset to read (Anthropic/hh-rlhf: harmless-base); null: all."
    )
    split: str = Field("train", description="For hub: the split.")
    options: dict[str, int | float | str | bool] = Field(
        default_factory=dict, description="For reasoning_gym: the task's own settings."
    )
    columns: dict[str, str] = Field(default_factory=dict, description="Row field → column name, where they differ.")
    template: str = Field(
        "{prompt}", pattern=r"\{prompt\}", description="What the policy sees of a prompt, for example a chat template."
    )
    answer_pattern: AnswerPattern | None = Field(
        None, description="What of the answer's column is the right answer: one group (GSM8K: `#### (.+)`); null: all."
    )
    objective: str | None = Field(
        None, min_length=1, description="For preferences: what its pairs compare, for example helpful or harmless."
    )
    licence: str = Field("unknown", description="Goes into the data card.")
    limit: Positive | None = Field(None, description="Keep at most this many rows, in the source's order.")

    @model_validator(mode="after")
    def _check_objective(self) -> Self:
        if self.objective and self.row_type != "preferences":
            raise ValueError(f"objective says what pairs compare; the rows of source {self.name!r} are {self.row_type}")
        return self


class CollectParams(Section):
    """Settings of stage collect."""

    sources: tuple[SourceParams, ...] = Field(min_length=1, description="The sources, read in this order.")

    @model_validator(mode="after")
    def _check_names_differ(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"source names must differ, got {names}")
        return self
