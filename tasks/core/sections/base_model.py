"""Where the base model comes from."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.core.sections.section import Positive, Section

__all__ = ["BaseModelParams"]


class BaseModelParams(Section):
    """The pre-trained language model that everything starts from."""

    kind: Literal["pypi", "hub", "folder", "random"] = Field(description="Where the model comes from.")
    id: str = Field(
        "", description="`package==version` for pypi, `owner/name` for hub, a path for folder, unused for random."
    )
    file: str = Field("", description="For pypi: the GGUF file inside the package.")
    sha256: str = Field("", description="For pypi: the checksum of the wheel, checked before it is opened.")
    revision: str = Field("main", description="For hub: the branch, tag or commit.")
    licence: str = Field("unknown", description="Goes into its card, the report, and the cards of exported policies.")
    pad_token: str = Field(
        "", description="The padding token, where the tokenizer's own is missing or ends a response."
    )
    layers: Positive = Field(2, description="For random: how many transformer layers.")
    hidden_size: Positive = Field(64, description="For random: the width; a multiple of 32.")

    @model_validator(mode="after")
    def _check_complete(self) -> Self:
        if self.kind != "random" and not self.id:
            raise ValueError(f"kind {self.kind!r} needs an id")
        if self.kind == "pypi" and not (self.file and self.sha256 and "==" in self.id):
            raise ValueError("kind 'pypi' needs id as package==version, file and sha256")
        return self
