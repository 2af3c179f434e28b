"""Presets from their sources to the rows that training would read; those of the hub on copies of their data."""

import gzip
import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

from tasks.collect import collect
from tasks.config.params import Params, load_params, load_preset, write_overrides
from tasks.core.paths import Artifacts
from tasks.core.rows import SPLITS, Demonstration, Preference, Prompt, read_rows
from tasks.preferences import preferences
from tasks.prepare import prepare
from tests.conftest import SHIPPED_PARAMS
from tests.support.tokenizers import write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"


def with_preset(preset: str, folder: Path, *changes: dict[str, Any]) -> Params:
    """The shipped parameters as `rlhf run --preset` changes them."""
    path = Path(shutil.copy(SHIPPED_PARAMS, folder))
    write_overrides(path, [load_preset(ROOT, preset), *changes])
    return load_params(path)


def settled(preset: str, file: Path, folder: Path) -> Params:
    """The preset over the shipped parameters, its source of the hub replaced by a file of the same columns."""
    if not file.is_file():
        pytest.skip(f"no {file.parent.name} on this machine")
    (source,) = load_preset(ROOT, preset)["collect"]["sources"]
    return with_preset(preset, folder, {"collect": {"sources": [{**source, "kind": "local", "id": str(file)}]}})


def prepared(params: Params, folder: Path) -> Path:
    collect(params.collect, params.seed, Artifacts(out=folder / "collect"))
    base_model = write_tokenizer(folder / "base_model")
    read = Artifacts(base_model=base_model, collect=folder / "collect", out=folder / "prepare")
    prepare(params.prepare, params.seed, read)
    return folder / "prepare"


def collected(folder: Path) -> list[dict[str, Any]]:
    (file,) = (folder / "collect" / "rows").iterdir()
    return [json.loads(line)["row"] for line in file.read_bytes().splitlines()]


@pytest.mark.parametrize("preset", ["code", "poem", "reverse_words", "service_bot"])
def test_presets_hold_out_as_many_prompts_as_their_evaluation_asks_for(preset: str, tmp_path: Path) -> None:
    params = with_preset(preset, tmp_path)
    rows = prepared(params, tmp_path)
    assert len(read_rows(rows / "prompts" / "test.jsonl", Prompt)) >= params.evaluate.prompts
    assert len(read_rows(rows / "demonstrations" / "train.jsonl", Demonstration)) > 0


def test_reversed_lists_are_those_that_the_script_makes_and_no_word_of_a_test_is_in_training(tmp_path: Path) -> None:
    text = (ROOT / "infra" / "presets" / "reverse_words.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [*runpy.run_path(str(ROOT / "scripts" / "reverse_words_rows.py"))["rows"]()] == lines
    assert all(len({*row["words"].split()}) == 4 for row in lines)
    rows = prepared(with_preset("reverse_words", tmp_path), tmp_path)
    words = {}
    for split in SPLITS:
        prompts = read_rows(rows / "prompts" / f"{split}.jsonl", Prompt)
        asked = [row.prompt.splitlines()[0].removeprefix("Words: ").split() for row in prompts]
        assert [[*reversed(row)] for row in asked] == [(prompt.answer or "").split() for prompt in prompts]
        words[split] = {word for row in asked for word in row}
    assert not words["train"] & words["test"]
    assert not words["train"] & words["validation"]


@pytest.mark.slow
def test_harmless_dialogues_feed_every_stage_that_learns_from_people(tmp_path: Path) -> None:
    file = DATA / "hh-harmless" / "pairs.jsonl.gz"
    params = settled("harmless", file, tmp_path)
    rows = prepared(params, tmp_path)
    for row, line in zip(collected(tmp_path), gzip.decompress(file.read_bytes()).splitlines(), strict=False):
        sides = {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
        assert sides.items() <= json.loads(line).items()
    counts = json.loads((rows / "metrics.json").read_text())["rows"]
    assert counts["quarantined"] < 0.02 * counts["collected"]
    assert params.preferences
    assert params.gold_judge
    preferences(params.preferences, params.seed, Artifacts(prepare=rows, out=tmp_path / "preferences"))
    train = read_rows(tmp_path / "preferences" / "train.jsonl", Preference)
    assert len(train) == params.preferences.train_pairs
    assert all(row.prompt.endswith("\n\nAssistant:") for row in train)
    assert max(len((row.prompt + side).split()) for row in train for side in (row.chosen, row.rejected)) <= 80
    gold = read_rows(rows / "preferences" / "gold" / "train.jsonl", Preference)
    assert len(gold) >= params.gold_judge.max_examples
    assert not {row.prompt for row in gold} & {row.prompt for row in train}
    assert len(read_rows(rows / "demonstrations" / "train.jsonl", Demonstration)) >= params.sft.max_examples
    asked = read_rows(rows / "prompts" / "test.jsonl", Prompt)
    assert len(asked) >= params.evaluate.prompts
    assert not {row.prompt for row in asked} & {row.prompt for row in [*train, *gold]}


@pytest.mark.slow
def test_gsm8k_problems_become_solutions_to_imitate_and_answers_to_be_paid_for(tmp_path: Path) -> None:
    params = settled("gsm8k", DATA / "gsm8k" / "train.jsonl.gz", tmp_path)
    rows = prepared(params, tmp_path)
    assert all(row["response"].endswith(f"#### {row['answer']}") for row in collected(tmp_path))
    shown = read_rows(rows / "demonstrations" / "train.jsonl", Demonstration)
    assert len(shown) >= params.sft.max_examples
    assert all(row.prompt.startswith("Question: ") and row.prompt.endswith("\nAnswer:") for row in shown)
    assert all(row.answer and row.response.endswith(f"#### {row.answer}") for row in shown)
    assert params.reward.weights == {"answer": 1.0}
    asked = read_rows(rows / "prompts" / "test.jsonl", Prompt)
    assert len(asked) >= params.evaluate.prompts
    assert all(row.answer for row in asked), "the right answers are the gold judge"
