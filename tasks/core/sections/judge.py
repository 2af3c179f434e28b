"""Settings of the LLM judge of pairs."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.core.sections.section import Positive, Section

__all__ = ["JudgeParams"]


class JudgeParams(Section):
    """LLM judge that compares two responses (Zheng et al. 2023, arXiv 2306.05685)."""

    kind: Literal["local", "endpoint"] = Field(
        "local", description="The pipeline's base model, or a server that speaks OpenAI's chat completions."
    )
    model: str = Field("", description="For endpoint: the model's name there.")
    base_url: str = Field(
        "", description="For endpoint: its address up to `/v1`; the key, where it wants one, is $OPENAI_API_KEY."
    )
    rubric: str = Field(
        "Two endings of the same film review follow. The better one likes the film more, and says so in good English.",
        min_length=1,
        description="What makes a response the better one.",
    )
    prompts: Positive = Field(description="How many of the evaluation's prompts; each policy's pairs are asked twice.")
    max_requests: Positive = Field(
        1000, description="For endpoint: nothing is asked where more answers than this are missing."
    )
    max_tokens: Positive = Field(
        500_000, description="For endpoint: a run stops before its next question once its answers took this many."
    )

    @model_validator(mode="after")
    def _check_complete(self) -> Self:
        if self.kind == "local" and (self.model or self.base_url):
            raise ValueError("kind 'local' is the pipeline's base model: model and base_url are for kind 'endpoint'")
        if self.kind == "endpoint" and not (self.model and self.base_url.startswith(("http://", "https://"))):
            raise ValueError("kind 'endpoint' needs model, and base_url as http(s)://…/v1")
        if set("@?") & set(self.base_url):
            raise ValueError("base_url must hold no password or key, it is written down: use $OPENAI_API_KEY")
        return self
