"""The real stages, end to end, on the preset `tiny`: by `rlhf run`, then again, then by `dvc repro` from scratch."""

import csv
import json
import math
import shutil
import sys
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.pipeline.conftest import PATIENCE, ROOT, Project

PIPELINE: dict[str, Any] = YAML(typ="safe").load(ROOT / "dvc.yaml")
STAGES = list(PIPELINE["stages"])
FIGURES = {"reward_proxy", "reward_gold", "win_rate", "win_rate_low", "win_rate_high", "kl", "length"}


def lines(output: str) -> dict[str, str]:
    words = [line.split() for line in output.splitlines() if line.startswith("✓")]
    return {word[1]: word[2] for word in words}


def test_every_stage_runs_and_the_policies_are_compared(tiny: tuple[Project, str]) -> None:
    project, output = tiny
    assert lines(output) == dict.fromkeys(STAGES, "ran")
    for policy in ("ppo", "grpo", "dpo"):
        assert policy in output.partition("Policies on held-out prompts")[2]
    shown = json.loads(project.rlhf("show", "--json"))
    assert {"sft", "ppo", "grpo", "dpo"} <= set(shown)
    for policy, figures in shown.items():
        assert set(figures) >= (FIGURES - {"kl"} if policy == "human" else FIGURES), policy
    assert "LLM judge" in output
    assert shown["ppo"]["judge_n"] == 4


def test_a_warning_does_not_hide_that_everything_is_up_to_date(tiny: tuple[Project, str]) -> None:
    output = tiny[0].rlhf("status")
    assert "Everything is up to date" in output
    assert "generation.max_new_tokens: 8 → " in output


def test_the_curve_has_every_kept_policy_and_best_of_n(tiny: tuple[Project, str]) -> None:
    folder = tiny[0].root / "artifacts"
    with (folder / "overoptimisation" / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], int(row["level"])) for row in rows] == [
        ("best_of_n", 2), ("best_of_n", 4), ("ppo", 1), ("ppo", 2), ("grpo", 1), ("grpo", 2),
    ]  # fmt: skip
    assert float(rows[1]["kl"]) == pytest.approx(math.log(4) - 3 / 4, abs=1e-6)
    assert 'id="curve">Reward over-optimisation<' in (folder / "evaluate" / "report.html").read_text()
    last = (folder / "ppo" / "policies" / "0002" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert last == (folder / "ppo" / "adapter" / "adapter_model.safetensors").read_bytes()


def test_benchmarks_of_every_policy_stand_in_the_report(tiny: tuple[Project, str]) -> None:
    folder = tiny[0].root / "artifacts"
    results = json.loads((folder / "lm_eval" / "results.json").read_text())
    assert list(results) == ["sft", "ppo", "grpo", "dpo"]
    for own in results.values():
        assert {task: list(row) for task, row in own.items()} == {
            "held_out_perplexity": ["word_perplexity", "byte_perplexity", "bits_per_byte"],
            "held_out_preferences": ["acc", "acc_norm"],
        }
    assert "held_out_perplexity" in (folder / "evaluate" / "report.html").read_text()


def test_again_everything_is_cached(tiny: tuple[Project, str]) -> None:
    assert lines(tiny[0].rlhf("run")) == dict.fromkeys(STAGES, "cached")
    assert "up to date" in tiny[0].dvc("status")


def test_a_stage_opens_only_what_dvc_yaml_says_it_reads(tiny: tuple[Project, str]) -> None:
    opened = {tuple(line.split()) for line in tiny[1].splitlines() if " artifacts/" in line and line[0].isalpha()}
    pairs = {(stage, path) for stage, path in opened if stage in STAGES}
    assert len({stage for stage, _ in pairs}) == len(STAGES), "the watch saw nothing of some stage"
    for stage, path in sorted(pairs):
        known = [*PIPELINE["stages"][stage]["deps"], f"artifacts/{stage}"]
        assert any(path == dep or path.startswith(f"{dep}/") for dep in known), f"{stage} opens {path}, not in its deps"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_dvc_repro_from_scratch_gives_the_same_bytes(tiny_copy: Project) -> None:
    """Every stage in a process of its own, no cache: the same hashes in dvc.lock, weights included."""
    project = tiny_copy
    lock = project.lock()
    for path in ("artifacts", ".dvc/cache", ".rlhf", "dvc.lock"):
        shutil.rmtree(project.root / path, ignore_errors=True)
    (project.root / "dvc.lock").unlink(missing_ok=True)
    project.command(sys.executable, "-m", "dvc", "repro", timeout=3 * PATIENCE)  # a Python and its imports per stage
    assert project.lock() == lock


def test_the_reward_is_checked_before_training(tiny: tuple[Project, str]) -> None:
    output = tiny[0].rlhf("reward", "check", "--prompts", "4", "--samples", "4")
    shown = {name: line for line in output.splitlines() for name in ("best of 4", "other language") if name in line}
    written = json.loads((tiny[0].root / ".rlhf" / "reward-check" / "gains.json").read_text())
    for name, line in shown.items():
        assert f" {written[name]['gains']['proxy']['mean']:z.2f} (" in line, name
    unconfirmed = [name for name, gain in written.items() if gain["unconfirmed"]]
    assert f"hacks that gain more than 0.5 by the reward and not by gold: {len(unconfirmed)}\n" in output
    assert "Everything is up to date" in tiny[0].rlhf("status"), "it writes nothing that a stage reads"


def test_the_check_of_a_reward_says_which_stages_it_waits_for(tiny_copy: Project) -> None:
    """A changed reward is what it is for; a changed SFT must run first."""
    tiny_copy.edit("params.yaml", "repetition: 0.5", "repetition: -9.0")
    output = tiny_copy.rlhf("reward", "check", "--prompts", "3", "--samples", "2", "--json")
    found = json.loads(output[output.index("{") :])
    assert found == json.loads((tiny_copy.root / ".rlhf" / "reward-check" / "gains.json").read_text())
    assert {gain["prompts"] for gain in found.values()} == {3}
    tiny_copy.edit("params.yaml", "r: 4", "r: 5")
    output = tiny_copy.rlhf("reward", "check", expect=1)
    assert "error: the check reads stages that are not up to date (sft: lora.r: 4 → 5; " in output
    assert "`rlhf run sft reward_model gold_judge` first" in output
