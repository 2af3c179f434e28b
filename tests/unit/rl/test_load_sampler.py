"""Sampling of a policy of the artifacts on given prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tasks.config.training import GenerationParams
from tasks.core.errors import ConfigError
from tasks.models.loading import policy_stages
from tasks.rl.rollout import load_sampler, sample_in_batches
from tests.conftest import letter_tokenizer
from tests.support.tiny_policy import write_parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


def samples(
    parts: Path, prompts: list[str], count: int, *, policy: str = "ppo", length: int = 6, chat: bool = False
) -> list[tuple[str, str, bool]]:
    """Prompt, response and whether it ended, for each sample; in batches of 3 prompts."""
    generation = GenerationParams(max_new_tokens=length, temperature=1.0)
    sampler, generator = load_sampler(parts, policy, generation, chat_template=chat), torch.Generator().manual_seed(0)
    rollouts = sample_in_batches(sampler, prompts, generator, samples_per_prompt=count, batch_size=3)
    return [row for r in rollouts for row in zip(r.prompt_texts, r.texts, r.has_eos.tolist(), strict=True)]


def test_each_prompt_gets_its_samples_in_order_and_batches_differ(parts: Path) -> None:
    prompts = list("abcabcab")
    found = samples(parts, prompts, 2)
    assert [prompt for prompt, _, _ in found] == [prompt for prompt in prompts for _ in range(2)]
    assert found == samples(parts, prompts, 2)
    assert found[:6] != found[6:12], "a second batch must not repeat the first"


def test_has_eos_separates_an_end_token_from_a_cut(parts: Path) -> None:
    assert {ended for _, _, ended in samples(parts, ["a"], 40, length=40)} == {True, False}


def test_the_reference_is_sampled_without_the_policys_adapter(parts: Path) -> None:
    assert samples(parts, ["ab"], 8, policy="sft") != samples(parts, ["ab"], 8)


def test_an_empty_prompt_is_refused(parts: Path) -> None:
    with pytest.raises(ConfigError, match="prompt '' is empty"):
        samples(parts, [""], 1)


def test_a_chat_template_is_used_where_there_is_one(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer has no chat template: leave --chat-template out"):
        samples(parts, ["a"], 1, chat=True)
    shutil.copytree(parts, tmp_path / "parts")
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = (
        "{{ messages[0].role }}{{ messages[0].content }}{% if add_generation_prompt %}z{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "parts" / "base_model" / "model")
    by_template, by_hand = samples(tmp_path / "parts", ["ab"], 8, chat=True), samples(parts, ["userabz"], 8)
    assert [text for _, text, _ in by_template] == [text for _, text, _ in by_hand]
    assert by_template[0][0] == "ab"


def test_stages_that_score_are_no_policies(tmp_path: Path) -> None:
    for stage, kind in {"sft": "CAUSAL_LM", "reward_model": "SEQ_CLS"}.items():
        (tmp_path / stage / "adapter").mkdir(parents=True)
        (tmp_path / stage / "adapter" / "adapter_config.json").write_text(json.dumps({"task_type": kind}))
    (tmp_path / "dpo" / "adapter").mkdir(parents=True)
    (tmp_path / "dpo" / "adapter" / "OFF").touch()
    assert policy_stages(tmp_path) == ["sft"]
