"""Read, check and change params.yaml; its sections are in `tasks.core.sections`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tasks.config.base import Section
from tasks.config.data import CollectParams, PreferencesParams, PrepareParams
from tasks.config.evaluation import EvaluateParams, GateParams, LmEvalParams, OveroptimisationParams
from tasks.config.reward import LEARNED, RewardParams
from tasks.config.rules import GROUND_TRUTH_RULES
from tasks.config.training import (
    BaseModelParams,
    DPOParams,
    EnvironmentParams,
    GenerationParams,
    GoldJudgeParams,
    GRPOParams,
    LoraParams,
    PPOParams,
    RewardModelParams,
    SFTParams,
)
from tasks.core.errors import ConfigError

__all__ = ["Params", "load_params", "load_preset", "parse_override", "write_overrides"]

PRESETS = Path("infra/presets")


class Params(Section):
    """The whole of params.yaml. A stage whose section is null is off: it writes empty outputs, and nothing needs it."""

    seed: int = Field(ge=0, description="Every random choice follows from it, but for those of `policy_seed`.")
    policy_seed: int = Field(
        ge=0,
        description="The random choices of PPO, GRPO and DPO: other seeds are other policies from the same inputs.",
    )
    base_model: BaseModelParams
    collect: CollectParams
    prepare: PrepareParams
    lora: LoraParams
    sft: SFTParams
    preferences: PreferencesParams | None
    reward_model: RewardModelParams | None
    gold_judge: GoldJudgeParams | None
    generation: GenerationParams
    environment: EnvironmentParams | None
    reward: RewardParams
    ppo: PPOParams | None
    grpo: GRPOParams | None
    dpo: DPOParams | None
    overoptimisation: OveroptimisationParams | None
    lm_eval: LmEvalParams | None
    evaluate: EvaluateParams
    gate: GateParams | None

    @model_validator(mode="after")
    def _check_stage_dependencies(self) -> Self:
        if self.preferences is None and ((self.reward_model and self.reward_model.pairwise) or self.dpo):
            raise ValueError(
                "preferences is null, but reward_model and dpo learn from pairs: set them to null too (a reward_model "
                "of kind rating or classification learns from ratings)"
            )
        if self.reward_model is None and LEARNED in self.reward.weights and (self.ppo or self.grpo):
            raise ValueError("reward_model is null, but reward.weights names `learned`: remove it there")
        if self.gold_judge and self.gold_judge.kind == "preference" and not self.prepare.gold_pair_share:
            raise ValueError(
                "gold_judge.kind is preference, but prepare.gold_pair_share keeps no pairs for it: raise it"
            )
        rewarded = [name for name, rule in self.reward.rules.items() if rule.function == "sentiment"]
        if rewarded and self.evaluate.vader:
            raise ValueError(
                f"evaluate.vader is true, but the reward's component {rewarded[0]} is VADER itself: set "
                "evaluate.vader to "
                "false, for a judge must be one that training never saw"
            )
        gold = self.evaluate.gold_rule
        rules = {rule.function for rule in self.reward.rules.values()}
        if gold and gold.function in rules - set(GROUND_TRUTH_RULES):
            raise ValueError(
                f"evaluate.gold_rule is {gold.function}, which the reward has, too: a judge must be one that training "
                "never saw; choose another rule"
            )
        if gold and self.overoptimisation and not self.gold_judge:
            raise ValueError(
                "overoptimisation is on, but knows no judge: it uses gold_judge, which is null, and not "
                "evaluate.gold_rule; set overoptimisation to null"
            )
        if self.gate and "win_rate_vader" in self.gate.margins and not self.evaluate.vader:
            raise ValueError("gate.margins names win_rate_vader, but evaluate.vader is false: remove it there")
        return self

    @model_validator(mode="after")
    def _check_environment(self) -> Self:
        rewarded, by_turns = "environment" in self.reward.weights, self.ppo is not None and self.ppo.action == "turn"
        if self.environment is None:
            if rewarded or by_turns:
                raise ValueError("reward.weights.environment and ppo.action turn need an environment, which is null")
            return self
        if not rewarded:
            raise ValueError("environment is on, but reward.weights does not name it: add environment: 1.0 there")
        one_text = ("preferences", "reward_model", "gold_judge", "dpo", "overoptimisation")
        on = [name for name in one_text if getattr(self, name)]
        on += [f"evaluate.{name}" for name in ("llm_judge", "vader") if getattr(self.evaluate, name)]
        if on:
            raise ValueError(f"environment is on, and {', '.join(on)} can read no conversations: switch off")
        return self


def load_params(path: Path) -> Params:
    """Read and check params.yaml.

    Raises:
        ConfigError: the file is missing or no YAML, a key is unknown or missing, or a value is out of bounds.
    """
    return _validate(_read(path), str(path))


def load_preset(root: Path, name: str) -> dict[str, Any]:
    """Load a preset's overlay, as nested keys.

    Raises:
        ConfigError: there is no such preset.
    """
    path = root / PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in (root / PRESETS).glob("*.yaml"))) or "none"
        raise ConfigError(f"no preset {name!r} in {PRESETS}; known presets: {known}")
    return dict(_read(path))


def parse_override(text: str) -> dict[str, Any]:
    """Parse `ppo.kl_coef=0.1` into nested keys; the value is YAML, and a mapping replaces the old one.

    Raises:
        ConfigError: there is no `=`, or the value is no YAML.
    """
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"-S {text!r}: write it as section.key=value, for example -S ppo.kl_coef=0.1")
    try:
        parsed: Any = YAML(typ="safe", pure=True).load(value)  # reads `{url: http://host}`, which libyaml does not
    except YAMLError as error:
        raise ConfigError(f"-S {text!r}: the value is no YAML: {error}") from error
    if isinstance(parsed, dict):
        parsed = _ReplaceMapping(parsed)
    for part in reversed(key.strip().split(".")):
        parsed = {part: parsed}
    return dict(parsed)


def write_overrides(path: Path, overrides: list[dict[str, Any]]) -> list[str]:
    """Write overrides into params.yaml, comments kept; nothing is written if the result is invalid.

    Returns:
        One line per value that changed: `ppo.kl_coef: 0.05 → 0.1`.

    Raises:
        ConfigError: as `load_params`, for the file with the changes applied.
    """
    yaml = YAML()
    yaml.width = 120
    document = _read(path, yaml)
    lines: list[str] = []
    for override in overrides:
        lines += _merge(document, override)
    _validate(document, f"{path} with the requested changes")
    if lines:
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            yaml.dump(document, file)
        temporary.replace(path)
    return lines


class _ReplaceMapping(dict[str, Any]):
    """A mapping that replaces instead of merging."""


def _merge(target: Any, override: dict[str, Any], prefix: str = "") -> list[str]:
    """Merge mappings and replace everything else; null switches a section off, and removes any other key."""
    lines = []
    for key, value in override.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and not isinstance(value, _ReplaceMapping) and isinstance(target.get(key), dict):
            lines += _merge(target[key], value, f"{name}.")
        elif value is None and not isinstance(target.get(key, {}), dict | None):
            lines.append(f"{name}: {_format_value(target.pop(key))} → removed")
        elif value is None and prefix and key not in target:
            continue
        elif key not in target or target[key] != value:
            lines.append(f"{name}: {_format_value(target.get(key))} → {_format_value(value)}")
            target[key] = dict(value) if isinstance(value, _ReplaceMapping) else value
    return lines


def _format_value(value: Any) -> str:
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
        problems = "\n".join(f"  {_format_error(item)}" for item in error.errors())
        raise ConfigError(f"{where} is not valid:\n{problems}") from error


def _format_error(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if not key:
        return str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key (value {item['input']!r}); check the spelling or remove it"
    if item["type"] == "missing":
        return f"{key}: missing; add it (see the fields of tasks/core/sections/)"
    return f"{key}: {item['msg']}, got {item['input']!r}"
