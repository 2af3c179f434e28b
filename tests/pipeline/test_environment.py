"""Conversations through the real stages, on random weights: everything fits together, and nothing is learned."""

import csv
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tasks.config.params import Params, load_params, load_preset, write_overrides
from tasks.core.paths import DISABLED_MARKER, Artifacts
from tasks.core.rows import Demonstration, read_rows
from tasks.evals.champion import compare_with_champion
from tasks.evals.compare import ScoredResponse
from tasks.runtime.stage_runner import stage_arguments
from tests.conftest import SHIPPED_PARAMS
from tests.pipeline.conftest import ROOT

SMALL: dict[str, Any] = {
    "overoptimisation": None,
    "generation": {"max_new_tokens": 4},
    "environment": {"max_turns": 2},
    "sft": {"max_examples": 16, "max_length": 512},
    "reward": {"weights": {"repetition": 0.5}},
    "ppo": {"prompts_per_update": 4, "micro_batch_size": 4},
    "grpo": {"prompts_per_update": 2},
    "evaluate": {"llm_judge": None, "prompts": 8},
}
"""What `tiny` and the preset leave too large; bytes are many."""

OFF_STAGES = ("reward_model", "gold_judge", "dpo", "overoptimisation", "lm_eval")


def small(preset: str, folder: Path) -> Params:
    file = Path(shutil.copy(SHIPPED_PARAMS, folder))
    write_overrides(file, [load_preset(ROOT, "tiny"), load_preset(ROOT, preset), SMALL])
    return load_params(file)


def run(stage: str, params: Params, folder: Path) -> None:
    function = getattr(importlib.import_module(f"tasks.{stage}"), stage)
    (folder / stage).mkdir()
    upstream = {path.name: path for path in folder.iterdir() if path.is_dir()}
    function(*stage_arguments(function, stage, params), Artifacts(**upstream, out=folder / stage))


def switch_off(stage: str, folder: Path) -> None:
    (folder / stage / "adapter").mkdir(parents=True)
    (folder / stage / "adapter" / DISABLED_MARKER).touch()
    for name in ("points.csv", "accuracy_by_margin.csv", "calibration.csv"):
        (folder / stage / name).touch()
    for name in ("fits.json", "results.json"):
        (folder / stage / name).write_text("{}\n")


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["service_bot", "second_try"])
def test_policies_in_conversations_learn_and_are_compared(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if preset == "second_try":
        pytest.importorskip("reasoning_gym", reason="an extra of the project")
    monkeypatch.setenv("RLHF_ROOT", str(tmp_path))
    (tmp_path / "dvc.yaml").touch()
    params = small(preset, tmp_path)
    for stage in OFF_STAGES:
        switch_off(stage, tmp_path)
    for stage in ("base_model", "collect", "prepare", "sft", "ppo", "grpo", "evaluate"):
        run(stage, params, tmp_path)
    prompts = {row.prompt for row in read_rows(tmp_path / "prepare" / "demonstrations" / "train.jsonl", Demonstration)}
    assert all(prompt.startswith("User: ") and prompt.endswith("\nBot:") for prompt in prompts)
    for stage in ("ppo", "grpo"):
        with (tmp_path / stage / "history.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 2
        for row in rows:
            assert 1 <= float(row["turns"]) <= 2
            assert float(row["success"]) == float(row["reward/environment"])
            assert float(row["length"]) <= 2 * 4, "the policy's own tokens, not the environment's"
            assert "hacking/repetition" in row
        samples = [json.loads(line) for line in (tmp_path / stage / "samples.jsonl").read_text().splitlines()]
        assert samples
        assert all("\nUser: " in sample["response"] for sample in samples)
    table = json.loads((tmp_path / "evaluate" / "policies.json").read_text())
    assert list(table) == ["sft", "ppo", "grpo"]
    records = read_rows(tmp_path / "evaluate" / "responses.jsonl", ScoredResponse)
    for policy, row in table.items():
        own = [record for record in records if record.policy == policy]
        assert {"success", "success_low", "success_high", "turns"} <= set(row)
        assert row["success"] == row["reward_gold"] == round(sum(record.gold for record in own) / len(own), 6)
        assert not any(key.startswith("accuracy") for key in row)
        assert all(record.conversation and "\nUser: " not in record.response for record in own)
    page = " ".join((tmp_path / "evaluate" / "report.html").read_text().split())
    itself = compare_with_champion(
        "ppo", params.evaluate, params.generation, params.seed, metrics=("win_rate", "reward_gold", "kl"),
        artifacts=tmp_path, champion=tmp_path, champion_policy="ppo", environment=params.environment,
    )  # fmt: skip
    assert itself["win_rate"].low <= 0.5 <= itself["win_rate"].high, "other draws of the same policy"
    assert list(json.loads((tmp_path / "evaluate" / "controls.json").read_text())) == ["null"]
    assert "Success" in page
    assert "whether the conversation reached its goal" in page
    assert "Right<br>answers" not in page
