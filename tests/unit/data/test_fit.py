"""params.yaml against data and model: all that does not fit is found at once, and what is suggested fits."""

import json
import random
import shutil
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from tasks.collect import collect
from tasks.config.params import Params, load_params, load_preset, parse_override, write_overrides
from tasks.core.paths import Artifacts
from tasks.core.rows import SPLITS, Demonstration, Preference, Prompt, Rating, write_json, write_rows
from tasks.data import fit
from tasks.data.fit import Misfit, find_misfits, format_misfits
from tasks.data.prepared_rows import PreparedRows
from tasks.data.token_lengths import TokenCounter
from tasks.models.encoding import encode_row
from tasks.models.loading import load_context
from tasks.preferences import preferences
from tasks.prepare import prepare
from tasks.rewards.rules import base
from tests.conftest import ROOT, letter_tokenizer
from tests.support.tokenizers import write_tokenizer

WORDS = [a + b for a in ("ba", "co", "du", "fe", "gi", "ho", "ka", "lu") for b in ("nal", "rem", "sit", "tor", "vex")]
PAIRS = {"row_type": "preferences"}
Find = Callable[..., dict[str, Misfit]]


def text(draw: random.Random, least: int, most: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))


def rows_of(row_type: str, count: int, **fields: Any) -> list[dict[str, Any]]:
    """Made-up rows of a source."""
    draw = random.Random(1)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        row: dict[str, Any] = {"id": str(number), **fields}
        if row_type == "ratings":
            row |= {"text": text(draw, 11, 20), "ratings": [draw.randint(-4, 4) for _ in range(5)]}
        else:
            row |= {"prompt": text(draw, 8, 16)}
        if row_type == "preferences":
            row |= {"chosen": text(draw, 5, 9), "rejected": text(draw, 5, 9)}
        if row_type == "demonstrations":
            row |= {"response": text(draw, 3, 5)}
        rows.append(row)
    return rows


@pytest.fixture
def find(params_yaml: Path, tmp_path: Path) -> Find:
    """Misfits by key, for sources (row type → rows) under the shipped parameters with changes."""

    def run(sources: dict[str, list[dict[str, Any]]], *settings: str, layers: int = 30) -> dict[str, Misfit]:
        content = []
        for name, rows in sources.items():
            write_rows(tmp_path / f"{name}.jsonl", rows)
            content.append({"name": name, "kind": "local", "row_type": name, "id": str(tmp_path / f"{name}.jsonl")})
        if content:
            write_overrides(params_yaml, [{"collect": {"sources": content}}])
        write_overrides(params_yaml, [parse_override(setting) for setting in settings])
        return misfits_of(params_yaml, tmp_path, layers)

    return run


def misfits_of(params_yaml: Path, folder: Path, layers: int) -> dict[str, Misfit]:
    params = load_params(params_yaml)
    prepared(params, folder)
    context = load_context(folder / "base_model")
    card = {"layers": layers, "linear_modules": ["q_proj", "v_proj"], "context": context}
    write_json(folder / "base_model" / "card.json", card)
    return {item.key: item for item in find_misfits(params, folder / "base_model", folder / "prepare")}


def prepared(params: Params, folder: Path) -> Path:
    shutil.rmtree(folder / "collect", ignore_errors=True)
    collect(params.collect, params.seed, Artifacts(out=folder / "collect"))
    base_model = folder / "base_model"
    if not (base_model / "model").is_dir():
        write_tokenizer(base_model)
    read = Artifacts(base_model=base_model, collect=folder / "collect", out=folder / "prepare")
    prepare(params.prepare, params.seed, read)
    return folder / "prepare"


def suggestions(found: dict[str, Misfit]) -> dict[str, str]:
    return {key: item.suggestion for key, item in found.items()}


@pytest.mark.parametrize(("preset", "layers"), [("tiny", 2), ("code", 30), ("poem", 30), ("service_bot", 30)])
def test_a_preset_fits_its_data(
    preset: str, layers: int, params_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit.shutil, "which", lambda program: program)
    write_overrides(params_yaml, [load_preset(ROOT, preset)])
    assert not [item for item in misfits_of(params_yaml, tmp_path, layers).values() if item.blocks]


def test_own_pairs_are_listed_at_once_and_what_is_suggested_fits(find: Find, params_yaml: Path, tmp_path: Path) -> None:
    write_model(tmp_path, 125)
    found = find({"preferences": rows_of("preferences", 300)}, "generation.max_new_tokens=20", layers=2)
    cut = {f"{stage}.max_cut_share" for stage in ("sft", "reward_model", "dpo")}
    assert set(found) - {"gold_judge.max_cut_share", "generation.max_new_tokens"} == cut | {
        "preferences.train_pairs", "preferences.heldout_pairs", "reward_model.lora_first_layer", "evaluate.prompts",
        "gold_judge.lora_first_layer", "gold_judge.kind", "prepare.gold_pair_share",
    }  # fmt: skip
    assert suggestions(found)["gold_judge.kind"] == "preference"
    assert suggestions(found)["reward_model.lora_first_layer"] == "1"
    message = format_misfits(list(found.values()))
    assert all(f"  {key}: {item.value} → {item.suggestion}" in message for key, item in found.items())
    settings = [f"{key}={item.suggestion}" for key, item in found.items()]
    assert find({}, *settings, layers=2) == {}
    params = load_params(params_yaml)
    assert params.preferences
    preferences(params.preferences, params.seed, Artifacts(prepare=tmp_path / "prepare", out=tmp_path / "preferences"))
    more = params.preferences.train_pairs + 1
    assert find({}, f"preferences.train_pairs={more}", layers=2)["preferences.train_pairs"].suggestion == str(more - 1)


def test_pairs_whose_prompt_fills_the_context_are_left_out_and_all_counts_are_of_the_rest(
    find: Find, tmp_path: Path
) -> None:
    """A token a letter: prompts have up to 95, the long ones from 190 on, and a response shall have 20."""
    write_model(tmp_path, 170)
    rows = rows_of("preferences", 200)
    long = [row | {"prompt": " ".join([row["prompt"]] * 4)} for row in rows[:40]]
    found = find({"preferences": [*long, *rows[40:]]}, "generation.max_new_tokens=20")
    limit = int(found["prepare.max_preference_words"].suggestion)
    assert 25 <= limit < 40
    assert "of 200 prompts leave no room for 20 new tokens" in found["prepare.max_preference_words"].reason
    settings = [f"{key}={item.suggestion}" for key, item in found.items()]
    assert find({}, *settings) == {}


def test_a_judge_is_suggested_whole_where_there_is_none(find: Find) -> None:
    """README's own words for data without ratings are `gold_judge: null`."""
    found = find({"preferences": rows_of("preferences", 300)}, "gold_judge=null")
    section = parse_override(f"gold_judge={found['gold_judge'].suggestion}")["gold_judge"]
    assert section["kind"] == "preference"
    assert found["gold_judge"].stage == "evaluate"
    assert found["prepare.gold_pair_share"].suggestion == "0.3"
    settings = [f"{key}={item.suggestion}" for key, item in found.items()]
    assert find({}, *settings) == {}


def write_model(folder: Path, context: int) -> None:
    """A token per letter, and a configuration that states a context."""
    letter_tokenizer().save_pretrained(folder / "base_model" / "model")
    write_json(
        folder / "base_model" / "model" / "config.json", {"model_type": "llama", "max_position_embeddings": context}
    )


@pytest.mark.parametrize(
    ("context", "settings", "suggested"),
    [
        (1000, (), {}),
        (1000, ("sft.max_length=90", "dpo.max_length=90"), {"sft.max_length": "auto", "dpo.max_length": "auto"}),
        (1000, ("sft.max_length=90", "sft.max_cut_share=0.99"), {}),
        (
            60,
            ("sft.max_length=400", "gold_judge.kind=rating"),
            {"sft.max_cut_share": "", "generation.max_new_tokens": ""},
        ),
    ],
)
def test_rows_longer_than_the_setting_or_the_context(
    context: int, settings: tuple[str, ...], suggested: dict[str, str], find: Find, tmp_path: Path
) -> None:
    write_model(tmp_path, context)
    found = find({"preferences": rows_of("preferences", 200)}, *settings)
    keys = ("max_length", "max_cut_share", "max_new_tokens")
    found = {key: item for key, item in found.items() if item.blocks and key.endswith(keys)}
    assert suggestions(found).items() >= suggested.items()
    assert not (suggested == {} and found), found


@pytest.mark.parametrize("kind", ["rating", "preference"])
def test_rated_texts_are_measured_too(kind: str, find: Find, tmp_path: Path) -> None:
    """A token per letter: a text has eleven words of three letters or more."""
    write_model(tmp_path, 20)
    found = find(SOURCES, *SMALL, f"reward_model.kind={kind}")
    for stage in ("reward_model", "gold_judge", *(["dpo"] if kind == "preference" else [])):
        assert "rows are longer than 20 tokens" in found[f"{stage}.max_cut_share"].reason, stage
    write_model(tmp_path, 1000)
    cut = {"reward_model.max_cut_share", "gold_judge.max_cut_share", "dpo.max_cut_share"}
    assert not cut & set(find(SOURCES, *SMALL, f"reward_model.kind={kind}"))


def test_what_a_rule_or_module_lacks_is_reported_at_the_first_stage_that_needs_it(
    find: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "find_spec", lambda name: None)
    found = find(SOURCES, *SMALL, "reward.weights.language=1", "lora.reward_model_modules=[q_pro]")
    assert found["reward.weights.language"].stage == "ppo"
    assert found["lora.reward_model_modules"].stage == "reward_model"
    backbone = "reward_model.backbone={kind: folder, id: a}"
    assert find({}, backbone, "ppo=null")["lora.reward_model_modules"].stage == "gold_judge", "it has the base model"
    found = find({}, "gold_judge=null", "grpo=null", "evaluate.gold_rule={function: poem}")
    assert "lora.reward_model_modules" not in found, "its modules are the backbone's"
    assert {found[key].stage for key in ("reward.weights.language", "evaluate.gold_rule")} == {"evaluate"}


def test_the_judge_s_pairs_are_those_that_prepare_will_keep_for_it(
    find: Find, params_yaml: Path, tmp_path: Path
) -> None:
    """The prompts' source alone knows the groups, ten prompts each; two of them share a prompt, so they are one."""
    pairs = rows_of("preferences", 200)
    asked = [{"id": f"p{n}", "prompt": row["prompt"], "group": f"g{n // 10}"} for n, row in enumerate(pairs)]
    asked.append({"id": "both", "prompt": pairs[0]["prompt"], "group": "g1"})
    sources = {"preferences": pairs, "prompts": asked}
    find(sources, "gold_judge=null")
    planned = PreparedRows(load_params(params_yaml), tmp_path / "prepare")
    assert planned.gold_share == 0.3
    gold = {split: {row.id for row in planned.gold_pairs(split)} for split in SPLITS}
    find(sources, "prepare.gold_pair_share=0.3")
    kept = PreparedRows(load_params(params_yaml), tmp_path / "prepare")
    assert gold == {split: {row.id for row in kept.read("preferences/gold", split, Preference)} for split in SPLITS}
    assert 20 < sum(map(len, gold.values())) < 120


def test_tokens_are_counted_as_the_stages_count_them(tmp_path: Path) -> None:
    """`ab` is two tokens, ` abc` four and ` d` two; the end token is one more."""
    write_model(tmp_path, 9)
    tokens = TokenCounter(tmp_path / "base_model" / "model", load_context(tmp_path / "base_model"))
    assert (tokens.context, tokens.prompts(["ab", ""]), tokens.rows(["ab"], [" abc"], [" d"])) == (9, [2, 0], [7])
    row = encode_row(letter_tokenizer(), "ab", " abc", " d")
    assert row.length == 7


RATINGS, PROMPTS = rows_of("ratings", 60), rows_of("prompts", 60)
SOURCES = {"ratings": RATINGS, "prompts": PROMPTS}
SMALL = (
    "preferences.train_pairs=9", "preferences.heldout_pairs=2", "evaluate.prompts=4", "ppo.prompts_per_update=8",
    "grpo.prompts_per_update=8",
)  # fmt: skip


@pytest.mark.parametrize(
    ("sources", "settings", "key", "suggestion", "reason"),
    [
        (SOURCES, (), "", "", ""),
        ({"ratings": RATINGS[:30]}, ("ppo.prompts_per_update=64", "ppo.minibatches=4"), "ppo.prompts_per_update",
         "8", "there are 9 prompts in train"),
        ({"ratings": RATINGS[:30]}, ("grpo.prompts_per_update=64",), "grpo.prompts_per_update", "9", "there are 9"),
        (SOURCES, ("evaluate.prompts=90",), "evaluate.prompts", "23", "there are 23 prompts in test"),
        (SOURCES, ("evaluate.prompts=90", "evaluate.llm_judge={prompts: 80, rubric: a}"),
         "evaluate.llm_judge.prompts", "23", "there are 23 prompts in test"),
        (SOURCES, ("overoptimisation={prompts: 99, samples_per_prompt: 2, batch_size: 1, bootstrap_samples: 9}",),
         "overoptimisation.prompts", "23", "there are 23 prompts in test"),
        (SOURCES, ("prepare.gold_pair_share=0.4", "gold_judge.kind=preference"), "gold_judge.kind", "rating",
         "there are no pairs"),
        ({"preferences": rows_of("preferences", 60)}, ("reward_model.kind=rating",), "reward_model.kind", "preference",
         "learns from ratings"),
        (SOURCES, ("reward.weights.answer=1",), "reward.weights.answer", "", "prompts in train have no `answer`"),
        (SOURCES, ("ppo=null", "grpo=null", "reward.weights.answer=1"), "reward.weights.answer", "", "in test have no"),
        ({"prompts": PROMPTS}, (), "sft.max_examples", "", "no demonstrations in train: add a source"),
        ({"prompts": PROMPTS}, (), "preferences.train_pairs", "", "add a source of preferences or ratings, or set"),
        ({"prompts": PROMPTS}, ("gold_judge=null",), "gold_judge", "", "set evaluate.gold_rule"),
        ({"prompts": rows_of("prompts", 60, answer="7")}, (), "gold_judge", "null", "others judge"),
        ({"prompts": PROMPTS}, ("evaluate.gold_rule={function: language}",), "gold_judge", "null", "others judge"),
        ({"preferences": rows_of("preferences", 4)}, (), "gold_judge.max_examples", "", "pairs for the judge"),
        ({"preferences": rows_of("preferences", 4)}, (), "preferences.heldout_pairs", "", "raise prepare.valid"),
    ],
)  # fmt: skip
def test_what_does_not_fit(
    sources: dict[str, Any], settings: tuple[str, ...], key: str, suggestion: str, reason: str, find: Find
) -> None:
    found = find(sources, *SMALL, *settings)
    if not key:
        assert found == {}
        return
    assert found[key].suggestion == suggestion, found
    assert reason in found[key].reason


@pytest.mark.parametrize(
    ("setting", "key", "extra"),
    [
        ("lm_eval={tasks: [a], batch_size: 1}", "lm_eval", "lm-eval"),
        ("evaluate.llm_judge={prompts: 1, kind: endpoint, base_url: http://a, model: m, rubric: b}",
         "evaluate.llm_judge.kind", "judge"),
        ("reward.weights.language=1", "reward.weights.language", "rules"),
        ("evaluate.gold_rule={function: poem}", "evaluate.gold_rule", "poem"),
    ],
)  # fmt: skip
def test_an_extra_that_is_not_installed_is_named_with_its_command(
    setting: str, key: str, extra: str, find: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "find_spec", lambda name: None)
    found = find(SOURCES, *SMALL, setting)
    assert f"`pip install -e '.[{extra}]'`" in found[key].reason
    monkeypatch.setattr(fit, "find_spec", util.find_spec)
    assert find(SOURCES) == {}


def test_the_packages_of_rules_are_those_that_they_import() -> None:
    source = "".join(path.read_text() for path in Path(base.__file__).parent.glob("*.py"))
    for rule, (module, _) in fit.RULE_PACKAGES.items():
        assert rule == "code" or f'import_extra("{module}' in source, rule
    assert source.count('import_extra("') == 4, "a new one belongs into RULE_PACKAGES"


def test_a_misfit_without_a_value_is_the_users_to_decide() -> None:
    found = [Misfit("sft", "sft.max_examples", 9, "", "none"), Misfit("ppo", "ppo.epochs", 2, "1", "some")]
    assert format_misfits(found).splitlines()[1:] == [
        "`rlhf run --fit` sets:", "  ppo.epochs: 2 → 1  (some)", "Yours to decide:", "  sft.max_examples: 9  (none)",
    ]  # fmt: skip
    assert json.dumps(format_misfits(found[:1])).count("--fit") == 0


def test_responses_that_cannot_be_sampled_whole_are_a_warning_and_missing_modules_an_error(find: Find) -> None:
    """Tokens are words: responses have 3 to 5, and an end token."""
    settings = ("generation.max_new_tokens=4", "lora.target_modules=[q_pro]")
    found = find({"demonstrations": rows_of("demonstrations", 300)}, *settings)
    assert (found["generation.max_new_tokens"].blocks, found["generation.max_new_tokens"].suggestion) == (False, "6")
    assert (found["lora.target_modules"].blocks, found["lora.target_modules"].suggestion) == (True, "all-linear")
    assert "q_proj, v_proj" in found["lora.target_modules"].reason


def test_lengths_are_summarised_by_kind_of_row(tmp_path: Path) -> None:
    """A word is a token; a response has an end token, a pair counts by its longer side."""
    rows = {
        "prompts": [Prompt(id="p", prompt="a b c"), Prompt(id="q", prompt="a")],
        "demonstrations": [Demonstration(id="d", prompt="a b", response=" c d e f")],
        "preferences": [Preference(id="r", prompt="a b", chosen=" c", rejected=" c d e f")],
        "ratings": [Rating(id=str(n), text="x " * n, ratings=(1.0,)) for n in range(1, 101)],
        "nothing": [],
    }
    assert TokenCounter(write_tokenizer(tmp_path) / "model").summary(rows) == {
        "prompts": {"median": 1, "99_percent": 3, "max": 3},
        "demonstrations": {"median": 7, "99_percent": 7, "max": 7},
        "preferences": {"median": 7, "99_percent": 7, "max": 7},
        "ratings": {"median": 51, "99_percent": 101, "max": 101},
    }
