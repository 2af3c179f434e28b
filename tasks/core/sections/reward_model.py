"""Settings of the reward model."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.core.sections.base_model import BaseModelParams
from tasks.core.sections.section import Positive, LearningRate, Section

__all__ = ["CHAT", "PAIRWISE", "RewardModelParams", "PretrainedRewardParams"]

CHAT = "chat"
"""`PretrainedRewardParams.template`: the model's own chat template."""

PAIRWISE = ("preference", "multi_objective")
"""Kinds that learn from pairs; the others learn from rated texts."""


class PretrainedRewardParams(Section):
    """A pretrained reward model, used without training."""

    id: str = Field(
        min_length=1,
        description="A sequence classifier of transformers with one output, or two classes of which the second is the "
        "good one: `owner/name` of the hub, or a path to a local folder.",
    )
    revision: str = Field("main", description="For the hub: the branch, tag or commit.")
    template: str = Field(
        "{prompt}{response}",
        description=f"The text that it reads, with `{{prompt}}` and `{{response}}` in it, or `{CHAT}`: its tokenizer's "
        "chat template, with a turn of the user and one of the assistant.",
    )

    @model_validator(mode="after")
    def _check_complete(self) -> Self:
        if self.template != CHAT and not ("{prompt}" in self.template and "{response}" in self.template):
            raise ValueError(f"template needs {{prompt}} and {{response}}, or is `{CHAT}`; got {self.template!r}")
        return self


class RewardModelParams(Section):
    """A linear head on the SFT model, or on another backbone, or a pretrained reward model."""

    kind: Literal["preference", "rating", "classification", "multi_objective"] = Field(
        "preference",
        description="What it learns: which of two texts people prefer (Bradley–Terry), a text's mean rating, whether "
        "that is at least `threshold`, or preferences of several objectives, a head each.",
    )
    margin: Literal["none", "scaled"] = Field(
        "none",
        description="Whether a pair's score must differ by more where people preferred it more strongly: loss "
        "−log σ(r(chosen) − r(rejected) − m), m = margin_scale · the pair's margin (Touvron et al. 2023, arXiv "
        "2307.09288, equation 2); m is 0 where the margin is unknown, or negative: the label contradicts it.",
    )
    margin_scale: float = Field(1.0, gt=0, description="For margin `scaled`: log-odds per point of a pair's margin.")
    threshold: float | None = Field(
        None, description="For classification: a text whose mean rating is at least this is of the good class."
    )
    objectives: dict[str, float] | None = Field(
        None,
        description="For multi_objective: objective, as the sources of pairs name it → weight in the score, which is "
        "the weighted sum of the heads, each normalised by itself.",
    )
    max_examples: Positive | None = Field(
        None, description="For rating and classification: train on at most this many rated texts; null: on all."
    )
    length_debias: bool = Field(
        False,
        description="Whether what a linear fit explains of the raw score by the response's number of tokens, over "
        "responses of the SFT policy, is subtracted (Huang et al. 2024, arXiv 2409.17407, section 3, with a line for "
        "the bias).",
    )
    backbone: BaseModelParams | None = Field(
        None,
        description="The model below the head, with its own tokenizer; keys as in base_model; null: the SFT model.",
    )
    pretrained: PretrainedRewardParams | None = Field(None, description="A pretrained reward model; nothing is trained.")
    ensemble_size: Positive = Field(
        1,
        description="How many models, each with a seed of its own: an ensemble (Coste et al. 2023, arXiv 2310.02743; "
        "four do as well as five there), whose cost in training and scoring is that many times one model's.",
    )
    lora_first_layer: int = Field(
        ge=0,
        description="Layers below this one stay as they are: no adapters there, so no gradient is computed for them.",
    )
    epochs: Positive = Field(description="Passes over the pairs or texts.")
    batch_size: Positive = Field(description="Pairs, or rated texts, per optimiser step.")
    learning_rate: LearningRate = Field(description="Peak learning rate of AdamW; linear decay.")
    max_length: Positive = Field(description="Texts are cut at this many tokens.")
    normalisation_samples: int = Field(
        ge=2, description="Responses of the SFT policy on which the mean and spread of the raw reward are measured."
    )

    @property
    def pairwise(self) -> bool:
        """Whether it is trained, or where pretrained evaluated, on pairs."""
        return self.kind in PAIRWISE

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        for wrong, reason in (
            (self.margin == "scaled" and not self.pairwise, "margin: scaled is for kinds that learn from pairs"),
            (self.kind == "classification" and self.threshold is None, "kind classification needs a threshold"),
            (self.kind != "classification" and self.threshold is not None, "threshold is for kind classification"),
            (
                self.kind == "multi_objective" and len(self.objectives or {}) < 2,
                "kind multi_objective needs two objectives or more, for example {helpful: 0.7, harmless: 0.3}",
            ),
            (self.kind != "multi_objective" and bool(self.objectives), "objectives are for kind multi_objective"),
            (
                self.pairwise and self.max_examples is not None,
                "max_examples counts rated texts; preferences.train_pairs says how many pairs there are",
            ),
        ):
            if wrong:
                raise ValueError(f"{reason}; kind is {self.kind}")
        return self

    @model_validator(mode="after")
    def _check_pretrained(self) -> Self:
        trained = self.kind != "preference" or self.margin != "none" or self.backbone is not None or self.ensemble_size > 1
        if self.pretrained and trained:
            raise ValueError(
                "pretrained is set, so nothing is trained: leave kind at preference, margin at none, backbone at null "
                "and ensemble_size at 1"
            )
        return self
