"""Adapters as artifacts: equal weights are equal bytes, and a policy with its adapter off is the reference; padding."""

import json
from pathlib import Path

import pytest
import torch

from tasks.config.training import LoraParams
from tasks.core.errors import ModelError
from tasks.models.loading import (
    add_lora,
    load_policy,
    load_reference,
    load_reward_model,
    load_tokenizer,
    new_reward_model,
    pad_ids,
    position_ids,
    save_weights,
)
from tests.conftest import letter_tokenizer, tiny_model

LORA = LoraParams(r=4, alpha=8, target_modules="all-linear", reward_model_modules="all-linear")
IDS = torch.tensor([[3, 4, 5, 6]])


@pytest.fixture
def base_model(tmp_path: Path) -> Path:
    folder = tmp_path / "base_model"
    tiny_model().save_pretrained(folder / "model")
    letter_tokenizer().save_pretrained(folder / "model")
    return folder


def trained_adapter(base_model: Path, out: Path, seed: int = 0) -> Path:
    model = add_lora(load_reference(base_model, None), LORA, seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.1)
    save_weights(model, out)
    return out


def test_equal_weights_are_equal_bytes_without_paths(base_model, tmp_path):
    first = trained_adapter(base_model, tmp_path / "first") / "adapter"
    second = trained_adapter(base_model, tmp_path / "second") / "adapter"
    files = sorted(path.name for path in first.iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    text = (first / "adapter_config.json").read_text()
    assert str(tmp_path) not in text
    modules = json.loads(text)["target_modules"]
    assert modules == sorted(modules)


def test_fresh_adapter_changes_nothing_and_a_policy_with_its_adapter_off_is_the_reference(base_model, tmp_path):
    base = load_reference(base_model, None)(IDS).logits
    assert torch.equal(add_lora(load_reference(base_model, None), LORA, seed=0)(IDS).logits, base)
    sft = trained_adapter(base_model, tmp_path / "sft", seed=1)
    reference = load_reference(base_model, sft)(IDS).logits
    assert not torch.allclose(reference, base)
    policy = load_policy(base_model, sft, trained_adapter(base_model, tmp_path / "ppo", seed=2))
    assert not torch.allclose(policy(IDS).logits, reference)
    with policy.disable_adapter():
        torch.testing.assert_close(policy(IDS).logits, reference, rtol=1e-6, atol=1e-6)


def test_scorer_comes_back_as_it_was_saved(base_model, tmp_path):
    scorer = add_lora(new_reward_model(base_model, None, seed=3), LORA, seed=3, head="score", first_layer=1)
    with torch.no_grad():
        for parameter in scorer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    expected = scorer.eval()(IDS).logits
    save_weights(scorer, tmp_path / "scorer")
    torch.testing.assert_close(load_reward_model(base_model, None, tmp_path / "scorer")(IDS).logits, expected)


def test_first_layer_leaves_the_layers_below_without_adapters(base_model):
    scorer = add_lora(new_reward_model(base_model, None, seed=0), LORA, seed=0, head="score", first_layer=1)
    adapted = {name for name, parameter in scorer.named_parameters() if parameter.requires_grad and "lora" in name}
    assert adapted
    assert all("layers.1." in name for name in adapted)
    with pytest.raises(ModelError, match="first_layer is 2, but the model has 2 layers"):
        add_lora(new_reward_model(base_model, None, seed=0), LORA, seed=0, head="score", first_layer=2)


def test_scorers_and_policies_adapt_the_modules_that_are_named_for_them(base_model):
    lora = LORA.model_copy(update={"target_modules": ("q_proj",), "reward_model_modules": ("v_proj", "up_proj")})
    policy = add_lora(load_reference(base_model, None), lora, seed=0)
    scorer = add_lora(new_reward_model(base_model, None, seed=0), lora, seed=0, head="score", first_layer=1)
    for model, expected in ((policy, {"q_proj"}), (scorer, {"v_proj", "up_proj"})):
        adapted = [name for name, value in model.named_parameters() if value.requires_grad and "lora_" in name]
        assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in adapted} == expected


def test_reward_head_starts_with_spread_one_over_root_d_plus_one(base_model):
    """d = 32: the 32 weights of N(0, 1/√33) have a sample spread within 40 % of 0.174 (3 standard errors)."""
    weight = new_reward_model(base_model, None, seed=0).score.weight
    assert weight.std().item() == pytest.approx(33**-0.5, rel=0.4)


def test_a_folder_without_a_tokenizer_is_named_with_what_it_holds(base_model):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base_model / "model" / name).unlink()
    with pytest.raises(ModelError, match=r"model: no tokenizer.json \(found: .*config.json.*\)"):
        load_tokenizer(base_model)


def test_padding_with_the_end_token_is_refused(base_model):
    tokenizer = letter_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(base_model / "model")
    with pytest.raises(ModelError, match=r"eos='<end>' pad='<end>'; set base_model.pad_token"):
        load_tokenizer(base_model)


@pytest.mark.parametrize(
    ("rows", "side", "ids", "mask", "positions"),
    [
        ([[7, 8], [9]], "left", [[7, 8], [3, 9]], [[True, True], [False, True]], [[0, 1], [0, 0]]),
        ([[7, 8], [9]], "right", [[7, 8], [9, 3]], [[True, True], [True, False]], [[0, 1], [0, 1]]),
        ([[], [5]], "left", [[3], [5]], [[False], [True]], [[0], [0]]),
    ],
)
def test_rows_are_padded_on_one_side(rows, side, ids, mask, positions):
    padded, is_real = pad_ids(rows, 3, side=side)
    assert padded.tolist() == ids
    assert is_real.tolist() == mask
    assert is_real.dtype is torch.bool
    assert position_ids(is_real).tolist() == positions
