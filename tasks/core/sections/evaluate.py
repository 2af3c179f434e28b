"""Settings of the comparison of policies."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from tasks.core.sections.judge import JudgeParams
from tasks.core.sections.pattern import AnswerPattern
from tasks.core.sections.rules import Rule
from tasks.core.sections.section import Positive, Section

__all__ = ["EvaluateParams"]


class EvaluateParams(Section):
    """The comparison of all policies on held-out prompts."""

    prompts: Positive = Field(description="How many held-out prompts.")
    batch_size: Positive = Field(description="Sequences per forward pass.")
    bootstrap_samples: Positive = Field(description="Resamples of the prompts for each 95 % interval.")
    report_samples: Positive = Field(description="Prompts shown side by side in the report.")
    vader: bool = Field(description="Whether the VADER lexicon judges too: for tasks whose aim is a positive text.")
    llm_judge: JudgeParams | None = Field(description="A language model that compares each policy's responses with SFT's.")
    answer_pattern: AnswerPattern | None = Field(
        None,
        description="Where prompts have right answers: the form in which one must stand to be strictly right, as a "
        "regular expression with one group (GSM8K: `#### (\\-?[0-9\\.\\,]+)`); null: it is the whole response.",
    )

    gold_rule: Rule | None = Field(
        None,
        description="Where neither people's ratings nor the right answer as a text can judge: a rule that does; one "
        "that the reward does not have, such as `{function: language}`, or `code`, whose answers are tests.",
    )

    @model_validator(mode="after")
    def _check_judge_prompts(self) -> Self:
        if self.llm_judge and self.llm_judge.prompts > self.prompts:
            raise ValueError(f"llm_judge.prompts is {self.llm_judge.prompts}, but prompts is {self.prompts}")
        return self
