"""params.yaml and every preset: what is shipped is valid, and what is not valid is named."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

from tasks.core.errors import ConfigError
from tasks.core.params import Params, apply_changes, load_params, parse_override, preset_changes
from tasks.runtime.stage_runner import stage_arguments

ROOT = Path(__file__).resolve().parents[3]
PRESETS = sorted(path.stem for path in (ROOT / "infra" / "presets").glob("*.yaml"))
STAGES = [name for name in Params.model_fields if (ROOT / "tasks" / f"{name}.py").is_file()]


def test_there_are_presets_and_stages_to_test() -> None:
    assert {"arithmetic", "gpu", "gsm8k", "harmless", "poem", "tiny"} <= set(PRESETS)
    assert len(STAGES) == 13


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_resolves(preset: str, params_yaml: Path) -> None:
    """Valid on top of the shipped parameters, each of its keys does something, and every stage that is on gets all."""
    changes = preset_changes(ROOT, preset)
    assert apply_changes(params_yaml, [changes]), "a preset that changes nothing"
    params = load_params(params_yaml)
    for source in params.collect.sources:
        assert source.kind != "local" or (ROOT / source.id).is_file()
    for stage in STAGES:
        if getattr(params, stage) is None:
            continue
        function = getattr(importlib.import_module(f"tasks.{stage}"), stage)
        arguments, _ = stage_arguments(function, stage, params)
        kinds = [item.annotation for item in inspect.signature(function).parameters.values()]
        for argument, kind in zip(arguments, kinds, strict=False):
            assert argument is not None or kind.endswith(" | None"), f"{stage} reads a section that is off"
    assert apply_changes(params_yaml, [changes]) == [], "applied twice it changes something again"


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("ppo.learning_rte=1", r"ppo\.learning_rte: unknown key \(value 1\); check the spelling or remove it"),
        ("ppo.gamma=1.5", r"ppo\.gamma: Input should be less than or equal to 1, got 1\.5"),
        ("ppo.minibatches=7", "minibatches 7 must divide the 64 responses of an update"),
        ("sft=null", r"sft: Input should be a valid dictionary or instance of SFTParams, got None"),
        ("preferences=null", "preferences is null, but reward_model and dpo learn from pairs"),
        ("gold_judge.kind=preference", "prepare.gold_pair_share keeps no pairs for it"),
        ("reward_model.kind=classification", r"reward_model: .*kind classification needs a threshold"),
        (
            "collect.sources=[{name: a, kind: local, rows: ratings, id: a, objective: kind}]",
            "objective says what pairs",
        ),
        ("reward_model=null", "reward_model is null, but reward.weights names `learned`"),
        ("evaluate.judge={prompts: 209}", "judge.prompts is 209, but there are only 208 prompts"),
        (
            "evaluate.judge={prompts: 9, model: m}",
            "kind 'local' is the pipeline's base model: model and base_url are for",
        ),
        ("evaluate.judge={prompts: 9, kind: endpoint, model: m}", "kind 'endpoint' needs model, and base_url as http"),
        (
            "evaluate.judge={prompts: 9, kind: endpoint, model: m, base_url: 'https://me:secret@host/v1'}",
            "base_url must hold no password or key",
        ),
        ("gate.margin=0.05", r"gate\.margin: unknown key \(value 0\.05\); check the spelling or remove it"),
        ("gate.margins={}", "gate.margins: Dictionary should have at least 1 item"),
        ("gate.margins.length=1", r"gate\.margins\.length\S*: Input should be 'win_rate', .* or 'kl', got 'length'"),
        ("gate.margins.kl=-1", r"gate\.margins\.kl: Input should be greater than or equal to 0, got -1"),
        ("reward.weights.lenght=1", r"reward\.weights\.lenght: no such component; did you mean length"),
        ("reward.rules.brief={function: length}", "reward.rules names 'brief', which has no weight"),
        ("reward.rules.length=3", r"reward\.rules\.length: Value error, needs `function: <rule or module:function>`"),
        ("reward.gates={lenght: 1}", "reward.gates names 'lenght', which has no weight; there is: learned, repetition"),
        ("reward.composition=lexicographic", "priorities belong to lexicographic, which needs at least one"),
        ("evaluate.gold_rule={function: repetition}", "evaluate.gold_rule is repetition, which the reward has, too"),
        ("reward.curriculum={repetition: {1: 0.1, 4: 0.4}}", r"reward\.curriculum\.repetition ends at 0\.4, reward\.w"),
        ("reward.curriculum={repetition: {4: 0.1, 1: 0.5}}", "must name updates in rising order, got"),
        (
            "environment={kind: service_bot, max_turns: 4, gamma: 0.9}",
            "environment is on, but reward.weights does not name it: add environment: 1.0 there",
        ),
        ("reward.weights.environment=1", "reward.weights.environment and ppo.action turn need an environment"),
        ("ppo.action=turn", "reward.weights.environment and ppo.action turn need an environment"),
        ("collect.sources=[]", "collect.sources: Tuple should have at least 1 item"),
    ],
)
def test_what_is_not_valid_is_named_and_nothing_is_written(setting: str, problem: str, params_yaml: Path) -> None:
    before = params_yaml.read_bytes()
    with pytest.raises(ConfigError, match=problem):
        apply_changes(params_yaml, [parse_override(setting)])
    assert params_yaml.read_bytes() == before


def test_a_curve_needs_a_judge_that_it_can_use(params_yaml: Path) -> None:
    settings = (
        "gold_judge=null",
        "evaluate.gold_rule={function: language}",
        "overoptimisation={prompts: 1, samples_per_prompt: 2, batch_size: 1, bootstrap_samples: 9}",
    )
    with pytest.raises(ConfigError, match="overoptimisation is on, but knows no judge"):
        apply_changes(params_yaml, [parse_override(setting) for setting in settings])


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        (
            "{function: lenght}",
            r"reward\.rules\.mine: Value error, function: no rule is called 'lenght'; did you mean le",
        ),
        ("{function: length, target: 0}", r"reward\.rules\.mine\.target: Input should be greater than 0, got 0"),
        ("{function: length, goal: 3}", r"reward\.rules\.mine\.goal: unknown key \(value 3\); check the spelling"),
        ("{function: format}", r"reward\.rules\.mine\.pattern: missing; add it"),
        (
            "{function: format, pattern: '('}",
            r"reward\.rules\.mine\.pattern: Value error, no regular expression: missing",
        ),
        (
            "{function: json_schema, json_schema: {type: thing}}",
            r"reward\.rules\.mine\.json_schema: Value.*no JSON schema",
        ),
        ("{function: instructions}", r"reward\.rules\.mine: Value error, no constraint is set"),
        (
            "{function: poem, syllables: {C: [1, 2]}}",
            r"mine: Value error, syllables names \['C'\], which scheme 'AABBA'",
        ),
        ("{function: 'exampel:shout'}", r"no tasks/rewards/custom/exampel\.py; did you mean example"),
        ("{function: 'example:shuot'}", r"example\.py defines no 'shuot'; did you mean shout"),
        ("{function: 'example:shout', most: 1}", r"takes no option 'most'; did you mean at_most"),
    ],
)
def test_a_rule_that_is_not_valid_is_named(rule: str, problem: str, params_yaml: Path) -> None:
    changes = [parse_override("reward.weights.mine=1"), parse_override(f"reward.rules.mine={rule}")]
    with pytest.raises(ConfigError, match=problem):
        apply_changes(params_yaml, changes)


def test_a_rule_is_named_by_its_weight_by_its_entry_or_by_its_function(params_yaml: Path) -> None:
    settings = [
        "reward.weights={readability: 1, length: 1, brief: 1, loud: 0.2}",
        "reward.rules={length: {target: 3}, brief: {function: length, target: 5}, loud: {function: 'example:shout', "
        "at_most: 0.5, floor: -1}}",
    ]
    apply_changes(params_yaml, [parse_override(text) for text in settings])
    rules = load_params(params_yaml).reward.rules
    assert {name: rule.function for name, rule in rules.items()} == {
        "length": "length", "brief": "length", "loud": "example:shout", "readability": "readability",
    }  # fmt: skip
    assert (rules["length"].target, rules["length"].tolerance, rules["brief"].target) == (3, 12, 5)
    assert (rules["loud"].options, rules["loud"].floor) == ({"at_most": 0.5}, -1.0)
    assert load_params(params_yaml).reward.model_dump()["rules"]["brief"]["target"] == 5, "the report's digest reads it"


def test_vader_judges_nothing_that_it_pays(params_yaml: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.vader is true, but the reward's component sentiment is VADER"):
        apply_changes(params_yaml, [parse_override("reward.weights.sentiment=1")])


def test_a_margin_needs_its_judge(params_yaml: Path) -> None:
    vader = [parse_override("gate.margins.win_rate_vader=0.1")]
    apply_changes(params_yaml, vader)
    with pytest.raises(ConfigError, match=r"gate\.margins names win_rate_vader, but evaluate\.vader is false"):
        apply_changes(params_yaml, [parse_override("evaluate.vader=false")])


def test_params_of_before_margins_name_the_old_key_and_the_new_one(params_yaml: Path) -> None:
    lines = [line for line in params_yaml.read_text().splitlines() if "margins:" not in line]
    params_yaml.write_text("\n".join([*lines, "  margin: 0.05", ""]))
    with pytest.raises(ConfigError, match=r"gate\.margins: missing; add it") as error:
        load_params(params_yaml)
    assert "gate.margin: unknown key (value 0.05)" in str(error.value)


def test_a_mapping_given_as_a_value_replaces_the_old_one(params_yaml: Path) -> None:
    changes = ["base_model={kind: hub, id: owner/name}", "reward.weights={length: 0.5}", "reward.weights.repetition=2"]
    apply_changes(params_yaml, [parse_override(text) for text in changes])
    params = load_params(params_yaml)
    assert (params.base_model.id, params.base_model.file, params.base_model.pad_token) == ("owner/name", "", "")
    assert params.reward.weights == {"length": 0.5, "repetition": 2.0}


def test_a_preset_and_settings_stack(params_yaml: Path) -> None:
    """As the preset overoptimised says how to train against an ensemble."""
    settings = ["reward_model.members=4", "reward.combine=uncertainty"]
    apply_changes(params_yaml, [preset_changes(ROOT, "overoptimised"), *map(parse_override, settings)])
    params = load_params(params_yaml)
    assert params.reward_model
    assert (params.reward_model.members, params.reward.combine) == (4, "uncertainty")
    assert params.ppo
    assert params.ppo.kl_coef == 0


def test_a_value_that_is_set_to_null_is_removed(params_yaml: Path) -> None:
    assert apply_changes(params_yaml, [parse_override("reward.weights.repetition=null")]) == [
        "reward.weights.repetition: 0.5 → removed"
    ]
    assert load_params(params_yaml).reward.weights == {"learned": 1.0}
    with pytest.raises(ConfigError, match=r"ppo\.gamma: missing; add it"):
        apply_changes(params_yaml, [parse_override("ppo.gamma=null")])


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"no preset 'large' in infra/presets; known presets: arithmetic, code, gpu, gsm8k, harmless,"
    ):
        preset_changes(ROOT, "large")
