"""Rows of the preset `code`: whole templates can be held out, and each half of a row's tests asks for a computation."""

import ast
import json
import re
import runpy
from pathlib import Path

import pytest

from tasks.collect import collect
from tasks.config.params import Params, load_params, load_preset, write_overrides
from tasks.core.paths import Artifacts
from tasks.core.rows import SPLITS, Prompt, read_rows
from tasks.prepare import prepare

ROOT = Path(__file__).resolve().parents[3]
ROWS = [json.loads(line) for line in (ROOT / "infra/presets/code.jsonl").read_text(encoding="utf-8").splitlines()]


def _shape(response: str) -> str:
    """The formula without what its numbers and its argument are."""
    return re.sub(r"\b(x|items|text)\b", "argument", re.sub(r"\d+", "number", response))


def test_no_template_is_another_one_with_other_numbers() -> None:
    groups: dict[str, set[str]] = {}
    for row in ROWS:
        groups.setdefault(_shape(row["response"]), set()).add(row["group"])
    assert {shape: names for shape, names in groups.items() if len(names) > 1} == {}
    assert len(groups) == len({row["group"] for row in ROWS}) > 60


@pytest.mark.parametrize("half", [0, 1], ids=["training", "held out"])
def test_no_constant_passes_half_of_the_tests(half: int) -> None:
    for row in ROWS:
        lines = row["answer"].split("# held out")[half].strip().splitlines()
        calls = [ast.parse(line.removeprefix("assert "), mode="eval").body for line in lines]
        results = {ast.unparse(call.comparators[0]) for call in calls if isinstance(call, ast.Compare)}
        assert len(results) > 1, row["id"]


def test_the_rows_are_those_that_the_script_makes() -> None:
    assert [*runpy.run_path(str(ROOT / "scripts/code_rows.py"))["rows"]()] == ROWS


@pytest.fixture
def params(params_yaml: Path) -> Params:
    write_overrides(params_yaml, [load_preset(ROOT, "code")])
    return load_params(params_yaml)


def test_the_preset_tests_templates_that_training_has_not_seen(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    collect(params.collect, params.seed, Artifacts(out=tmp_path / "collect"))
    prepare(params.prepare, params.seed, Artifacts(collect=tmp_path / "collect", out=tmp_path / "prepare"))
    prompts = {split: read_rows(tmp_path / "prepare" / "prompts" / f"{split}.jsonl", Prompt) for split in SPLITS}
    group = {row["prompt"].strip(): row["group"] for row in ROWS}
    groups = {split: {group[row.prompt.strip()] for row in rows} for split, rows in prompts.items()}
    assert sum(map(len, groups.values())) == len(set().union(*groups.values())) == len({*group.values()})
    assert len(prompts["test"]) >= params.evaluate.prompts >= 50
    assert len(prompts["train"]) >= params.sft.max_examples >= 100
