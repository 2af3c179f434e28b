"""The whole pipeline with `lora: null`, and what becomes of its policy: registered, exported, sampled from."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tasks.models.loading import load_policy
from tests.pipeline.conftest import Project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TRAINED = ("sft", "reward_model", "gold_judge", "ppo", "grpo", "dpo")
IDS = torch.tensor([[5, 9, 3, 22, 11]])


def test_all_parameters_from_sft_to_a_registered_policy_and_back_to_adapters(
    tiny_copy: Project, tmp_path: Path
) -> None:
    project, adapters = tiny_copy, tiny_copy.lock()
    project.dvc("add", "data")
    project.commit()
    output = project.rlhf("run", "-S", "lora=null", "-S", "gate.min_win_rate=0", "-S", "gate.policy=ppo")
    assert output.count(" parameters are trained; ") == len(TRAINED)
    artifacts = project.root / "artifacts"
    for stage in (*TRAINED, "ppo/policies/0001", "grpo/policies/0002"):
        files = {path.name for path in (artifacts / stage / "adapter").iterdir()}
        assert {"config.json", "model.safetensors"} <= files
        assert "adapter_config.json" not in files
    assert "ppo" in json.loads(project.rlhf("show", "--json"))
    assert "gate ppo: promoted" in project.rlhf("retrain")
    project.rlhf("export", str(tmp_path / "out"))
    assert "all parameters of the SFT model" in (tmp_path / "out" / "README.md").read_text()
    with torch.no_grad():
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits
        policy = load_policy(artifacts / "base_model", artifacts / "sft", artifacts / "ppo")(IDS).logits
        sft = load_policy(artifacts / "base_model", artifacts / "sft", artifacts / "sft")(IDS).logits
    torch.testing.assert_close(exported, policy, rtol=0, atol=1e-5)
    assert (policy - sft).abs().max() > 1e-3, "the policy has learned nothing"
    assert "has no adapter" in project.rlhf("export", "--adapter", str(tmp_path / "adapter"), expect=1)
    texts = [project.rlhf("generate", "This film", "--json", "--model", name) for name in ("ppo", "champion")]
    assert texts[0] == texts[1]
    named = "stages here whose model writes: dpo, grpo, ppo, sft"
    assert named in project.rlhf("generate", "a", "--model", "reward_model", expect=1).replace("\n", " ")
    project.command("git", "checkout", "params.yaml")
    assert "running" not in project.rlhf("run"), "the adapters are in the cache"
    assert project.lock() == adapters
