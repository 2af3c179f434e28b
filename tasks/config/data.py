"""Sections of the stages that make the data: collect, prepare and preferences."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from tasks.config.base import AnswerPattern, Fraction, Positive, Section
from tasks.core.custom import check_kind
from tasks.core.rows import ROW_TYPES

__all__ = ["CollectParams", "PreferencesParams", "PrepareParams", "SourceParams"]

KINDS = ("film_reviews", "hub", "local", "reasoning_gym", "service_bot")


class SourceParams(Section):
    """One source of rows."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$", description="Names the data card.")
    kind: Annotated[str, AfterValidator(lambda name: check_kind("readers", name, KINDS))] = Field(
        description="Which reader to use; `module:function`: your own, in custom/readers."
    )
    row_type: Literal["prompts", "demonstrations", "preferences", "ratings"] = Field(
        description="The row type it yields."
    )
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
        {}, description="Of reasoning_gym's task, or of your own reader."
    )
    columns: dict[str, str] = Field(default_factory=dict, description="Row field → column name, where they differ.")
    template: str = Field("{prompt}", pattern=r"\{prompt\}", description="What the policy sees of a prompt.")
    answer_pattern: AnswerPattern | None = Field(
        None, description="What of the answer's column is the right answer: one group (GSM8K: `#### (.+)`); null: all."
    )
    objective: str | None = Field(
        None, min_length=1, description="For preferences: what its pairs compare, for example helpful or harmless."
    )
    licence: str = Field("unknown", description="Goes into the data card.")
    limit: Positive | None = Field(None, description="Keep at most this many rows, in the source's order.")

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        fields = ROW_TYPES[self.row_type].model_fields
        if unknown := [name for name in self.columns if name not in fields]:
            raise ValueError(
                f"columns: {self.row_type} have no field {unknown[0]!r}; their fields are {', '.join(fields)}"
            )
        return self

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


class PrepareParams(Section):
    """Validation, de-duplication and splitting."""

    prompt_words: Positive = Field(description="A rated text's first words, this many, become the prompt.")
    min_words: Positive = Field(description="Texts with fewer words are dropped, and counted.")
    max_words: Positive = Field(description="Texts with more words are dropped, and counted.")
    near_duplicate_threshold: float = Field(
        gt=0,
        le=1,
        description="Jaccard similarity of word trigrams from which two texts count as one; 1 looks for equal texts, "
        "which templated tasks need.",
    )
    validation_share: Fraction = Field(description="Share of texts held out for validation.")
    test_share: Fraction = Field(description="Share of texts held out for the final evaluation.")
    gold_share: Fraction = Field(description="Share of rated texts that only the gold judge sees.")
    gold_pair_share: Fraction = Field(0.0, description="Share of prompts whose preferences only the gold judge sees.")
    max_preference_words: Positive | None = Field(
        None,
        description="Preferences with more words, prompt included, on a side are dropped, and counted; null: none.",
    )
    max_quarantine_share: Fraction = Field(description="The stage fails when more of the rows than this are malformed.")

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not self.prompt_words < self.min_words <= self.max_words:
            got = f"{self.prompt_words}, {self.min_words}, {self.max_words}"
            raise ValueError(f"need prompt_words < min_words <= max_words, got {got}")
        if self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share + test_share must leave texts to train on")
        return self


class PreferencesParams(Section):
    """Number of pairs, and how they are drawn from rated texts."""

    train_pairs: Positive = Field(description="Pairs for training the reward model and DPO.")
    heldout_pairs: Positive = Field(description="Pairs for each of validation and test.")
    source_pairs: Literal["only", "prepend"] = Field(
        description="Use of pairs from sources, such as labels: the only ones, sampled down to the numbers above, or "
        "prepended to the training pairs drawn from ratings."
    )
    min_margin: float = Field(ge=0, description="Training pairs differ in mean rating by at least this many points.")
    raters_per_label: Positive = Field(
        description="A training label compares the means of this many randomly drawn raters for each side."
    )
