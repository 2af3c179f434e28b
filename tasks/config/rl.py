"""Sections of the stages that the RL trainer runs, PPO and GRPO, and of the engine that samples for them."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from tasks.config.base import LearningRate, Positive, Section

__all__ = ["GRPOParams", "PPOParams", "RLParams", "RolloutParams"]

KLPenalty = Literal["reward", "loss"]
KL_PENALTY = (
    "Where β · KL stands: in the reward as k1, or in the loss as ρ · k3; the policy gradient of each is that of "
    "KL(policy ‖ reference)."
)


class RLParams(Section):
    """Settings that the RL algorithms share."""

    stage: ClassVar[str]  # also the name of the section

    updates: Positive = Field(description="Rollout–update rounds.")
    prompts_per_update: Positive = Field(description="Prompts per rollout; each pass over them is a new permutation.")
    samples_per_prompt: Positive = Field(description="Responses sampled for each prompt.")
    resample_rounds: int = Field(
        0,
        ge=0,
        description="Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): so many times an update draws other "
        "prompts in place of those whose responses all have the same score; 0: never.",
    )
    epochs: Positive = Field(description="Passes over each rollout.")
    minibatches: Positive = Field(description="Optimiser steps per pass.")
    micro_batch_size: Positive = Field(description="Sequences per forward pass; never changes the gradient.")
    learning_rate: LearningRate = Field(description="Initial learning rate of Adam; annealed linearly to 0.")
    warmup_updates: int = Field(
        0, ge=0, description="Updates in which the learning rate rises, from step to step, to what it then is."
    )
    clip_range: float | None = Field(None, gt=0, lt=1, description="ε of the clipped objective; null: no clipping.")
    clip_range_high: float | None = Field(
        None, gt=0, description="ε above a ratio of 1 (DAPO's clip-higher: 0.28); null: that of clip_range."
    )
    dual_clip: float | None = Field(
        None,
        gt=1,
        description="Upper bound of the ratio where the advantage is negative (Ye et al. 2020, arXiv 1912.09729: 3); "
        "null: none.",
    )
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the mean entropy per token, which is rewarded.")
    top_entropy_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Only this share of a rollout's tokens, those of the highest entropy, has a policy gradient (Wang "
        "et al. 2025, arXiv 2506.01939: 0.2).",
    )
    mask_truncated: bool = Field(
        False,
        description="Whether responses without an end token count in no loss (DAPO, section 3.4); their scores still "
        "count in their group.",
    )
    max_grad_norm: float = Field(gt=0, description="Gradients are scaled down to this norm.")
    kl_coef: float = Field(ge=0, description="β: weight of the KL penalty.")
    kl_penalty: KLPenalty = Field(description=KL_PENALTY)
    kl_budget: float | None = Field(
        None, gt=0, description="Training ends with the last policy whose KL, nats per response, was within this."
    )
    target_kl: float | None = Field(None, gt=0, description="Ends an update's epochs beyond so many nats per action.")
    missing_eos_penalty: float = Field(ge=0, description="Subtracted from the score of responses without an end token.")
    overlong_buffer: int = Field(
        0,
        ge=0,
        description="Over so many last tokens before generation.max_new_tokens the penalty rises from 0 to "
        "missing_eos_penalty, for responses with an end token, too (DAPO, equation 13); 0: without end token only.",
    )
    checkpoint_every: Positive = Field(description="Updates between checkpoints from which an interrupted run goes on.")
    snapshot_every: Positive = Field(description="Updates between policies kept for the over-optimisation curve.")

    @model_validator(mode="after")
    def _check_shared(self) -> Self:
        batch = self.prompts_per_update * self.samples_per_prompt
        high = self.clip_range if self.clip_range_high is None else self.clip_range_high
        if batch % self.minibatches:
            raise ValueError(f"minibatches {self.minibatches} must divide the {batch} responses of an update")
        if self.dual_clip and (self.clip_range is None or self.dual_clip <= 1 + (high or 0)):
            raise ValueError(
                f"dual_clip {self.dual_clip} bounds ratios that clip_range leaves: set clip_range, and dual_clip above "
                "1 + clip_range_high"
            )
        if self.clip_range is None and self.clip_range_high and getattr(self, "loss_type", "") != "cispo":
            raise ValueError("clip_range is null, so nothing is clipped: set clip_range_high to null")
        if self.warmup_updates >= self.updates:
            raise ValueError(
                f"warmup_updates {self.warmup_updates} must be less than updates {self.updates}, or learning_rate is "
                "never reached"
            )
        if self.resample_rounds and self.samples_per_prompt < 2:
            raise ValueError("resample_rounds compares a prompt's responses: set samples_per_prompt above 1")
        if self.overlong_buffer and not self.missing_eos_penalty:
            raise ValueError(
                "overlong_buffer needs the penalty that it rises to: set missing_eos_penalty above 0 (DAPO: 1)"
            )
        return self


class PPOParams(RLParams):
    """Proximal policy optimisation (Schulman et al. 2017; Ziegler et al. 2019)."""

    stage = "ppo"

    action: Literal["token", "turn", "response"] = Field(
        description="What counts as one action with a probability ratio of its own: each token, each turn of a "
        "conversation, or the whole response."
    )
    advantage: Literal["gae", "leave_one_out", "return"] = Field(
        description="Generalised advantage estimation with a value function; the return of the response less the mean "
        "of the prompt's other responses; or the return from the token on. The last two have no value function."
    )
    gamma: float = Field(gt=0, le=1, description="Discount per token; 1 treats a response as one episode.")
    lam: float = Field(ge=0, le=1, description="λ of generalised advantage estimation.")
    value_lam: float | None = Field(
        None,
        ge=0,
        le=1,
        description="λ of the returns that the value function learns (VC-PPO, arXiv 2503.01491: 1); null: that of lam.",
    )
    value_clip_range: float | None = Field(None, gt=0, description="Maximum change of a value in an update; null: any.")
    value_coef: float = Field(ge=0, description="Weight of the value loss.")
    kl_penalty: KLPenalty = Field("reward", description=KL_PENALTY)
    kl_controller: Literal["fixed", "adaptive"] = Field(description="Whether β is fixed or adaptive.")
    ptx_coef: float = Field(
        0.0,
        ge=0,
        description="Weight of the mean loss per token of as many demonstrations as an optimiser step has responses "
        "(PPO-ptx); 0: none.",
    )
    adaptive_kl_target: float = Field(gt=0, description="Adaptive: nats per sequence to steer to.")
    kl_horizon: Positive = Field(description="Adaptive: episodes over which β can change by a fifth.")

    @property
    def has_values(self) -> bool:
        """Whether there is a value function."""
        return self.advantage == "gae"

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        episodes, leave_one_out = self.prompts_per_update * self.samples_per_prompt, self.advantage == "leave_one_out"
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
        if leave_one_out and self.samples_per_prompt < 2:
            raise ValueError("advantage: leave_one_out compares a prompt's responses: set samples_per_prompt above 1")
        if leave_one_out and (self.gamma != 1 or self.value_coef != 0):
            raise ValueError(
                "advantage: leave_one_out has no value function and no discount: set gamma to 1 and value_coef to 0, "
                f"got {self.gamma} and {self.value_coef}"
            )
        if not self.has_values and (self.value_coef != 0 or self.value_lam is not None):
            raise ValueError(
                f"advantage: {self.advantage} has no value function: set value_coef to 0 and value_lam to null"
            )
        if self.top_entropy_share < 1 and self.action != "token":
            raise ValueError(f"top_entropy_share chooses tokens, so action must be token, got {self.action}")
        return self


class GRPOParams(RLParams):
    """Group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300)."""

    stage = "grpo"

    samples_per_prompt: int = Field(ge=2, description="Responses per prompt: the group.")
    loss_type: Literal["grpo", "bnpo", "dapo", "dr_grpo", "cispo"] = Field(
        "dapo",
        description="How the losses of tokens are averaged: within each response first, over all tokens of the step "
        "(bnpo and dapo are one), or by the constant number of tokens that the responses could have. cispo averages as "
        "dapo, and a clipped ratio only weighs the gradient of a token, which it keeps.",
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group",
        description="What scores less their group's mean are divided by: the deviation of the group, of all scores of "
        "the update, or nothing (Dr. GRPO, arXiv 2503.20783).",
    )
    importance_level: Literal["token", "sequence"] = Field(
        "token",
        description="Whether each token has a ratio of its own, or all tokens of a response the geometric mean of "
        "theirs (GSPO, arXiv 2507.18071, with a clip_range of about 3e-4).",
    )
    kl_penalty: KLPenalty = Field("loss", description=KL_PENALTY)

    @model_validator(mode="after")
    def _check_clipping(self) -> Self:
        cispo, high = self.loss_type == "cispo", self.clip_range_high
        if cispo and (self.clip_range is not None or high is None):
            raise ValueError(
                "loss_type: cispo bounds ratios from above alone: set clip_range to null, and clip_range_high to the "
                "bound less 1, for example 4"
            )
        if cispo and self.importance_level == "sequence":
            raise ValueError("loss_type: cispo needs importance_level: token")
        return self


class RolloutParams(Section):
    """What samples for PPO and GRPO, and how its log-probabilities may differ from the trainer's."""

    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="The trainer's own model, or vLLM servers in an environment of their own."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="For vllm: the number format of its weights; auto: the trainer's."
    )
    is_level: Literal["token", "sequence"] = Field(
        "token", description="Whether each token has an importance weight, or a response the product of its tokens'."
    )
    is_mode: Literal["truncate", "mask"] = Field(
        "truncate", description="What happens to an importance weight above is_clip: it becomes is_clip, or 0."
    )
    is_clip: float = Field(
        2.0,
        ge=1,
        description="Importance weights w = π_trainer / π_engine correct the policy gradient where the engine samples "
        "from other probabilities than are trained; this is the largest.",
    )
    max_mismatch_kl: float = Field(
        0.01, gt=0, description="Training stops where KL(engine ‖ trainer), nats per token, is above this."
    )
