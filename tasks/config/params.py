"""Read, check and change params.yaml; its sections are in the other modules of `tasks.config`."""

import copy
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tasks.config import data, evaluation, rl, training
from tasks.config.base import LEARNED, Section
from tasks.config.reward import RewardParams
from tasks.config.rules import GROUND_TRUTH_RULES, CustomJudge
from tasks.config.yaml_text import edit_yaml
from tasks.core.errors import ConfigError

__all__ = ["Params", "differences", "load_params", "load_preset", "parse_override", "write_overrides"]

PRESETS = Path("infra/presets")


class Params(Section):
    """The whole of params.yaml. A stage whose section is null is off: it writes empty outputs, and nothing needs it.

    Where `lora` is null, the stages train all parameters.
    """

    seed: int = Field(ge=0, description="Every random choice follows from it, but for those of `policy_seed`.")
    policy_seed: int = Field(ge=0, description="Random choices of PPO, GRPO and DPO, which share all else.")
    base_model: training.BaseModelParams
    collect: data.CollectParams
    prepare: data.PrepareParams
    lora: training.LoraParams | None
    sft: training.SFTParams
    preferences: data.PreferencesParams | None
    reward_model: training.RewardModelParams | None
    gold_judge: training.GoldJudgeParams | None
    generation: training.GenerationParams
    environment: training.EnvironmentParams | None
    reward: RewardParams
    rollout: rl.RolloutParams = rl.RolloutParams.model_validate({})
    ppo: rl.PPOParams | None
    grpo: rl.GRPOParams | None
    dpo: training.DPOParams | None
    overoptimisation: evaluation.OveroptimisationParams | None
    lm_eval: evaluation.LmEvalParams | None
    evaluate: evaluation.EvaluateParams
    gate: evaluation.GateParams | None

    @model_validator(mode="after")
    def _check_stage_dependencies(self) -> Self:
        from_pairs = ["reward_model"] if self.reward_model and self.reward_model.pairwise else []
        from_pairs += ["dpo"] if self.dpo else []
        if self.preferences is None and from_pairs:
            verb = "learns" if len(from_pairs) == 1 else "learn"
            cure = ", or reward_model.kind to rating" if "reward_model" in from_pairs else ""
            raise ValueError(
                f"preferences is null, but {' and '.join(from_pairs)} {verb} from pairs: set to null, too{cure}"
            )
        if self.reward_model is None and LEARNED in self.reward.weights:
            raise ValueError(
                "reward_model is null, but reward.weights names `learned`: remove it there, for policies are compared "
                "by the reward, too"
            )
        if self.gold_judge and self.gold_judge.kind == "preference" and not self.prepare.gold_pair_share:
            raise ValueError(
                "gold_judge.kind is preference, but prepare.gold_pair_share keeps no pairs for it: raise it"
            )
        return self

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        if self.lora is None and self.rollout.engine == "vllm":
            raise ValueError(
                "lora is null, so all parameters are trained, but rollout.engine is vllm, which takes up nothing but "
                "adapters: set rollout.engine to transformers, or give the section lora"
            )
        return self

    @model_validator(mode="after")
    def _check_judges(self) -> Self:
        rules, gold = self.reward.rules, self.evaluate.gold_rule
        rewarded = [name for name, rule in rules.items() if rule.function == "vader"]
        if rewarded and self.evaluate.vader:
            raise ValueError(
                f"evaluate.vader is true, but the reward's component {rewarded[0]} is VADER itself: set evaluate.vader "
                "to false, for a judge must be one that training never saw"
            )
        own = isinstance(gold, CustomJudge)  # of custom/judges, so another function whatever its name
        if gold and not own and gold.function in {rule.function for rule in rules.values()} - set(GROUND_TRUTH_RULES):
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
        if self.gate and getattr(self, self.gate.policy, self) is None:
            raise ValueError(f"gate.policy is {self.gate.policy}, which is null: name another, or best")
        return self

    @model_validator(mode="after")
    def _check_environment(self) -> Self:
        rewarded, by_turns = "environment" in self.reward.weights, self.ppo is not None and self.ppo.action == "turn"
        for section in (self.ppo, self.grpo):
            if section and section.overlong_buffer > (0 if self.environment else self.generation.max_new_tokens):
                raise ValueError(
                    f"{section.stage}.overlong_buffer is {section.overlong_buffer}: it counts the last tokens of "
                    "generation.max_new_tokens, so it is at most that; with an environment, which has no such length, 0"
                )
        if self.environment is None and (rewarded or by_turns):
            key = "reward.weights names `environment`" if rewarded else "ppo.action is turn"
            raise ValueError(f"{key}, but environment is null: switch it on, or change that")
        if self.environment is None:
            return self
        if not rewarded:
            raise ValueError("environment is on, but reward.weights does not name it: add environment: 1.0 there")
        one_text = ("preferences", "reward_model", "gold_judge", "dpo", "overoptimisation")
        on = [name for name in one_text if getattr(self, name)]
        on += ["ppo.ptx_coef"] if self.ppo and self.ppo.ptx_coef else []
        on += [f"evaluate.{name}" for name in ("llm_judge", "vader") if getattr(self.evaluate, name)]
        if on:
            raise ValueError(f"environment is on, and {', '.join(on)} can read no conversations: switch off")
        return self


def load_params(path: Path) -> Params:
    """Read and check params.yaml; a ConfigError if it is missing or no YAML, or a key or value is wrong."""
    return _validate(_read(path), str(path))


def load_preset(root: Path, name: str, folder: Path = PRESETS) -> dict[str, Any]:
    """Load a preset's overlay, as nested keys; a ConfigError if there is no such preset."""
    path = root / folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in (root / folder).glob("*.yaml"))) or "none"
        raise ConfigError(f"no preset {name!r} in {folder}; known presets: {known}")
    return dict(_read(path))


def parse_override(text: str) -> dict[str, Any]:
    """Parse `ppo.kl_coef=0.1` into nested keys; a mapping replaces the old one; a ConfigError for no `=` or no YAML."""
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
    """Write overrides into params.yaml and keep the rest byte for byte; a ConfigError, and no change, if invalid.

    Keys that are missing are written with their defaults: DVC hashes the file, so it must hold every value.

    Returns:
        One line per value that changed: `ppo.kl_coef: 0.05 → 0.1`.
    """
    before, document = _read(path), _read(path, YAML())
    where = f"{path} with the requested changes" if overrides else str(path)
    off = {key for override in overrides for key in override if before.get(key, key) is None}
    with_nulls = copy.deepcopy(document)
    for override in overrides:
        _merge(document, override)
        _merge(with_nulls, override, remove=False)
    _check_removed_known(with_nulls, where)
    _write_defaults(document, _validate(document, where, off).model_dump())
    lines = list(differences(before, document))
    if document != before:
        text = edit_yaml(path.read_bytes().decode("utf-8"), before, document)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(text.encode("utf-8"))
        temporary.replace(path)
    return lines


class _ReplaceMapping(dict[str, Any]):
    """A mapping that replaces instead of merging."""


def _merge(target: Any, override: dict[str, Any], depth: int = 0, *, remove: bool = True) -> None:
    """Merge mappings, replace everything else; null switches a section off, and may remove any other key."""
    for key, value in override.items():
        if isinstance(value, dict) and not isinstance(value, _ReplaceMapping) and isinstance(target.get(key), dict):
            _merge(target[key], value, depth + 1, remove=remove)
        elif remove and value is None and depth and not isinstance(target.get(key), dict):
            target.pop(key, None)
        else:
            target[key] = dict(value) if isinstance(value, _ReplaceMapping) else value


def _check_removed_known(content: Any, where: str) -> None:
    """Check that no section lacks a key that is set to null, which removes it."""
    try:
        Params.model_validate(content)
    except ValidationError as error:
        unknown = [item for item in error.errors() if item["type"] == "extra_forbidden" and item["input"] is None]
        if unknown:
            raise _not_valid(where, [_format_error(item) for item in unknown]) from error


def _write_defaults(document: Any, values: Any) -> None:
    """Add what the validated values have and the document lacks, but no entry for a rule that has a weight alone."""
    if isinstance(document, dict):
        for key, value in values.items():
            named = {name: value[name] for name in document.get(key, {})} if key == "rules" else value
            _write_defaults(document.setdefault(key, _as_yaml(named)), named)
    elif isinstance(document, list):
        for item, value in zip(document, values, strict=True):
            _write_defaults(item, value)


def _as_yaml(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_yaml(inner) for key, inner in value.items()}
    return [_as_yaml(inner) for inner in value] if isinstance(value, tuple | list) else value


def differences(before: Any, after: Any, prefix: str = "") -> Iterator[str]:
    """Compare nested keys, a line per value that differs: `lora.target_modules.1: "v_proj" → "k_proj"`."""
    for key in {**before, **after}:
        old, new, name = before.get(key), after.get(key), f"{prefix}{key}"
        if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            old, new = dict(enumerate(old)), dict(enumerate(new))
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{name}.")
        elif key not in after:
            yield f"{name}: {_format_value(old)} → removed"
        elif old != new:
            yield f"{name}: {_format_value(old)} → {_format_value(new)}"


def _format_value(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def _read(path: Path, yaml: YAML | None = None) -> Any:
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: run this inside the project")
    try:
        content = (yaml or YAML(typ="safe")).load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start + 1}): save it as UTF-8"
        ) from error
    except YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must map section names to values, got {type(content).__name__}")
    return content


def _validate(content: Any, where: str, off: Container[object] = ()) -> Params:
    """Validate; `off` are the sections that were null before the changes."""
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        items = error.errors()
        partial = dict.fromkeys(item["loc"][0] for item in items if item["type"] == "missing" and item["loc"][0] in off)
        problems = [_format_error(item) for item in items if item["type"] != "missing" or item["loc"][0] not in partial]
        problems += [_format_partial(str(name), items) for name in partial]
        raise _not_valid(where, problems) from error


def _not_valid(where: str, problems: Sequence[str]) -> ConfigError:
    return ConfigError("\n".join([f"{where} is not valid:", *(f"  {line}" for line in problems)]))


def _format_partial(section: str, items: Sequence[Any]) -> str:
    keys = ", ".join(str(item["loc"][-1]) for item in items if item["type"] == "missing" and item["loc"][0] == section)
    return (
        f"{section}: it was null, and the changes bring only a part of it; give the whole section, with {keys}, or "
        "start from one that has it (`git checkout params.yaml` brings back all sections)"
    )


def _all_keys() -> set[str]:
    schema = Params.model_json_schema()
    return {name for part in (schema, *schema["$defs"].values()) for name in part.get("properties", {})}


def _format_error(item: Any) -> str:
    key, message = ".".join(str(part) for part in item["loc"]), str(item["msg"]).removeprefix("Value error, ")
    if not key:
        return message
    if item["type"] == "extra_forbidden":
        near = get_close_matches(str(item["loc"][-1]), _all_keys(), n=1)
        cure = f"did you mean {near[0]}?" if near else "check the spelling or remove it"
        return f"{key}: unknown key (value {item['input']!r}); {cure}"
    if item["type"] == "missing":
        return f"{key}: missing; add it (see the fields of tasks/config/)"
    if isinstance(item["input"], Mapping) and item["type"] == "value_error":
        return f"{key}: {message}"  # a rule between keys, which it names
    return f"{key}: {message}, got {item['input']!r}"
