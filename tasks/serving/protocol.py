"""Requests of OpenAI's protocol, as far as this project serves it, and of feedback."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

__all__ = ["ChatRequest", "CompletionRequest", "FeedbackRequest", "GenerationRequest"]

Text = Annotated[str, StringConstraints(min_length=1)]
User = Annotated[str, StringConstraints(max_length=200)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class GenerationRequest(_Request):
    """What both kinds of completion take. What is not offered may be sent with the value that changes nothing."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    stream: bool = False
    user: User = ""
    logprobs: bool | int | None = None
    n: int = Field(1, ge=1, le=1)
    top_p: float = Field(1, ge=1, le=1)
    frequency_penalty: float = Field(0, ge=0, le=0)
    presence_penalty: float = Field(0, ge=0, le=0)

    @property
    def stops(self) -> list[str]:
        """Texts before which an answer ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities are asked for; 0 asks for those of the chosen tokens."""
        return self.logprobs is not None and self.logprobs is not False


class CompletionRequest(GenerationRequest):
    """Body of /v1/completions."""

    prompt: Text
    logprobs: Literal[0, 1] | None = None


class Message(_Request):
    """A turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(GenerationRequest):
    """Body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    logprobs: bool = False
    max_completion_tokens: int | None = Field(None, ge=1)


class FeedbackRequest(_Request):
    """Body of /v1/feedback: an answer's id, and one thing that a person says of it."""

    id: str
    user: User = ""
    thumb: Literal["up", "down"] | None = None
    rating: float | None = Field(None, ge=-1, le=1, description="On the thumbs' scale: 1 is up, −1 is down.")
    correction: Text | None = Field(None, description="What it should have answered.")
    rejected: str | None = Field(None, description="Id of another answer to this prompt, which is worse.")

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if len(self.given) != 1:
            raise ValueError("give exactly one of thumb, rating, correction and rejected")
        return self

    @property
    def given(self) -> dict[str, bool | float | str]:
        """The name that MLflow's page shows → the value."""
        values = {"thumb": self.thumb and self.thumb == "up", "rating": self.rating, "correction": self.correction}
        values["preferred_over"] = self.rejected
        return {kind: value for kind, value in values.items() if value is not None}
