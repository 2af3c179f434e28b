"""Sampling of a policy on given prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tasks.evals.writing import BATCH_SIZE, Sampler, policy_stages

from tasks.core.errors import ConfigError
from tests.conftest import letter_tokenizer
from tests.support.tiny_policy import write_parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


def sampler(parts: Path, policy: str = "ppo", *, seed: int = 0, length: int = 6, chat: bool = False) -> Sampler:
    return Sampler(parts, policy, max_new_tokens=length, temperature=1.0, seed=seed, chat_template=chat)


def test_each_prompt_gets_its_samples_in_order(parts: Path) -> None:
    prompts = list("abcdefgh") * 5
    assert len(prompts) > BATCH_SIZE
    written = list(sampler(parts).sample(prompts, 2))
    assert [item.prompt for item in written] == [prompt for prompt in prompts for _ in range(2)]
    assert [item.sample_index for item in written] == [0, 1] * len(prompts)


def test_the_seed_decides_and_goes_on(parts: Path) -> None:
    first, same, other = sampler(parts), sampler(parts), sampler(parts, seed=1)
    samples = list(first.sample(["ab"], 4))
    assert samples == list(same.sample(["ab"], 4))
    assert samples != list(other.sample(["ab"], 4))
    assert samples != list(first.sample(["ab"], 4)), "a second call must not repeat the first"


def test_ended_separates_an_end_token_from_a_cut(parts: Path) -> None:
    written = list(sampler(parts, length=40).sample(["a"], 40))
    assert {item.ended for item in written} == {True, False}


def test_the_reference_writes_without_the_policys_adapter(parts: Path) -> None:
    assert list(sampler(parts, "sft").sample(["ab"], 8)) != list(sampler(parts, "ppo").sample(["ab"], 8))


def test_an_empty_prompt_is_refused(parts: Path) -> None:
    with pytest.raises(ConfigError, match="prompt '' is empty"):
        list(sampler(parts).sample([""], 1))


def test_a_chat_template_is_used_where_there_is_one(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ppo has no chat template"):
        sampler(parts, chat=True)
    shutil.copytree(parts, tmp_path / "parts")
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = (
        "{{ messages[0].role }}{{ messages[0].content }}{% if add_generation_prompt %}z{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "parts" / "base_model" / "model")
    responses = [item.response for item in sampler(tmp_path / "parts", chat=True).sample(["ab"], 8)]
    assert responses == [item.response for item in sampler(parts).sample(["userabz"], 8)]


def test_stages_that_judge_do_not_write(tmp_path: Path) -> None:
    for stage, kind in {"sft": "CAUSAL_LM", "reward_model": "SEQ_CLS"}.items():
        (tmp_path / stage / "adapter").mkdir(parents=True)
        (tmp_path / stage / "adapter" / "adapter_config.json").write_text(json.dumps({"task_type": kind}))
    (tmp_path / "dpo" / "adapter").mkdir(parents=True)
    (tmp_path / "dpo" / "adapter" / "OFF").touch()
    assert policy_stages(tmp_path) == ["sft"]
