"""The presets for GPUs, at a small size: a step of SFT, PPO and GRPO with each architecture that they are made for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from tasks.config.params import Params, load_params, load_preset, write_overrides
from tasks.core.paths import Artifacts
from tasks.grpo import grpo
from tasks.models.encoding import encode_chat, encode_prompt, encode_response
from tasks.models.fetch import byte_tokenizer, check_parts, save_model, set_padding
from tasks.models.loading import has_all_parameters, load_policy, load_reference, load_tokenizer, lora_config
from tasks.ppo import ppo
from tasks.sft import sft
from tests.support.tiny_stages import REWARD, write_inputs

ROOT = Path(__file__).resolve().parents[2]
PRESETS = ["gpu", "gpu_8b_lora", "gpu_0.6b_full"]

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "vocab_size": 272,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen3": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "llama": LlamaConfig(**SHAPE),
    "gemma3": Gemma3TextConfig(**SHAPE, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
}
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

# Start of a text, start and end of a turn, as the families write them (their chat templates, shortened to one turn).
MARKS = {
    "qwen3": ("", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    "llama": (
        "<|begin|>",
        "<|start_header|>user<|end_header|>\n\n",
        "<|eot|><|start_header|>assistant<|end_header|>\n\n",
    ),
    "gemma3": ("<bos>", "<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"),
}


def family_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A token per byte, and the family's marks; its chat template writes the start of the text itself."""
    tokenizer = byte_tokenizer()
    start, turn, answer = MARKS[family]
    if start:
        tokenizer.add_special_tokens({"bos_token": start})
    tokenizer.chat_template = f"{start}{turn}{{{{ messages[0]['content'] }}}}{{{{ {answer!r} }}}}"
    return tokenizer


def small(preset: str, folder: Path) -> Params:
    """The preset over the shipped parameters, a step of everything."""
    path = folder / "params.yaml"
    path.write_bytes((ROOT / "tests" / "support" / "params.yaml").read_bytes())
    rl = {"updates": 1, "prompts_per_update": 4, "micro_batch_size": 8, "minibatches": 1, "samples_per_prompt": 4}
    changes = {
        "sft": {"max_examples": 4, "max_validation_examples": 2, "batch_size": 4},
        "ppo": rl, "grpo": rl, "generation": {"max_new_tokens": 24},
    }  # fmt: skip
    write_overrides(path, [load_preset(ROOT, preset), changes])
    return load_params(path)


def inputs(family: str, folder: Path) -> Path:
    """Rows of random letters, and a random base model of the family, saved as stage base_model saves one."""
    write_inputs(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family])
    tokenizer = family_tokenizer(family)
    model.config.bos_token_id = model.generation_config.bos_token_id = tokenizer.bos_token_id
    set_padding(model, tokenizer, "")
    check_parts(model, tokenizer, family)
    save_model(model, tokenizer, folder / "base_model" / "model")
    return folder


@pytest.mark.parametrize("family", CONFIGS)
def test_prompts_begin_once_and_responses_end_with_the_tokenizers_end(family: str, tmp_path: Path) -> None:
    base_model = inputs(family, tmp_path) / "base_model"
    tokenizer, config = load_tokenizer(base_model), json.loads((base_model / "model" / "config.json").read_text())
    start = tokenizer.bos_token_id
    chat = encode_chat(tokenizer, "Hello")
    assert tokenizer.decode(chat) == "".join((*MARKS[family][:2], "Hello", MARKS[family][2]))
    assert chat.count(start) == (start is not None)
    assert encode_response(tokenizer, "Hello")[-1] == tokenizer.eos_token_id == config["eos_token_id"]
    assert tokenizer.eos_token_id not in encode_prompt(tokenizer, "Hello")
    assert config["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("preset", ["gpu", "gpu_8b_lora"])
def test_adapters_lie_on_every_linear_layer(preset: str, family: str, tmp_path: Path) -> None:
    lora = small(preset, tmp_path).lora
    assert lora
    model = AutoModelForCausalLM.from_config(CONFIGS[family])
    adapted = get_peft_model(model, lora_config(model, lora))
    found = {name.split(".")[-4] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert found == LINEAR


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_of_sft_ppo_and_grpo_changes_the_weights(preset: str, family: str, tmp_path: Path) -> None:
    params, of = small(preset, tmp_path), inputs(family, tmp_path)
    read = {"base_model": of / "base_model", "prepare": of / "prepare"}
    sft(params.sft, params.lora, None, 0, Artifacts(**read, out=of / "sft"))
    assert params.ppo
    assert params.grpo
    for function, section in ((ppo, params.ppo), (grpo, params.grpo)):
        folders = Artifacts(**read, sft=of / "sft", out=of / section.stage)
        function(section, params.lora, params.generation, REWARD, None, params.rollout, 0, folders)
    reference = load_reference(of / "base_model", of / "sft")
    for stage in ("ppo", "grpo"):
        assert has_all_parameters(of / stage) == (params.lora is None)
        policy = load_policy(of / "base_model", of / "sft", of / stage)
        read_ids = torch.tensor([[3, 4, 5]])
        with torch.no_grad():
            assert not torch.equal(policy(read_ids).logits, reference(read_ids).logits)
