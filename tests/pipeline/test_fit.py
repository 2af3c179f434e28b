"""Settings that do not fit the data or the model: one refusal before anything trains, and `--fit` mends them all."""

import json

from tests.pipeline.conftest import Project

MISFITS = {"preferences.train_pairs": 900, "gold_judge.lora_first_layer": 7, "evaluate.prompts": 99}


def flags(settings: dict[str, int]) -> list[str]:
    return [word for key, value in settings.items() for word in ("-S", f"{key}={value}")]


def test_a_run_is_refused_whole_and_fit_mends_it(tiny_copy: Project) -> None:
    before = tiny_copy.lock()
    refused = tiny_copy.rlhf("run", *flags(MISFITS), expect=1)
    assert "params.yaml does not fit the data and the base model; nothing was trained." in refused
    assert all(f"  {key}: {value} → " in refused for key, value in MISFITS.items())
    assert "✓ prepare" in refused
    assert "sft" not in [line.split()[1] for line in refused.splitlines() if line[:1] in "✓▸"]
    assert tiny_copy.lock() == before

    rows = json.loads(tiny_copy.rlhf("status", "--json"))
    reasons = [row["reasons"][0].partition(":")[0] for row in rows if row["action"] == "refuse"]
    assert sorted(reasons) == sorted(MISFITS)
    assert "`rlhf run --fit` sets" in tiny_copy.rlhf("status")

    parts = tiny_copy.rlhf("run", "sft")
    assert "✓ sft" in parts, "the stages of this run fit"
    output = tiny_copy.rlhf("run", "preferences", "--fit")
    assert "preferences.train_pairs: 900 → " in output
    assert "evaluate.prompts: 99 → " in output
    assert "✓ preferences      ran" in output
    assert [row for row in json.loads(tiny_copy.rlhf("status", "--json")) if row["action"] == "refuse"] == []


def test_what_cannot_fit_into_memory_is_refused_before_anything_trains(tiny_copy: Project) -> None:
    refused = tiny_copy.rlhf("run", "ppo", "-S", "ppo.samples_per_prompt=10000000", expect=1)
    assert "plan: at most" in refused
    assert "  ppo.prompts_per_update: 4  (needs " in refused
    assert "--anyway runs it" in refused
    assert "sft" not in [line.split()[1] for line in refused.splitlines() if line[:1] in "✓▸"]
