"""Weights as artifacts: equal weights are equal bytes, and a policy with its adapter off is the reference; padding."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tasks.config.training import LoraParams
from tasks.core.errors import ModelError
from tasks.models.loading import (
    add_lora,
    has_all_parameters,
    load_beside,
    load_policy,
    load_reference,
    load_reward_model,
    load_tokenizer,
    make_trainable,
    new_reward_model,
    pad_ids,
    policy_stages,
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


def trained_model(base_model: Path, out: Path, seed: int) -> Path:
    """All parameters, changed as by training."""
    model = make_trainable(load_reference(base_model, None), None, seed=0)
    draw = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=draw)
    save_weights(model, out)
    return out


def test_all_parameters_come_back_as_they_were_saved_and_are_equal_bytes(base_model, tmp_path):
    sft, same = (trained_model(base_model, tmp_path / name, seed=1) for name in ("sft", "same"))
    files = sorted(path.name for path in (sft / "adapter").iterdir())
    assert files == ["config.json", "generation_config.json", "model.safetensors"]
    for name in files:
        assert (sft / "adapter" / name).read_bytes() == (same / "adapter" / name).read_bytes()
        assert str(tmp_path).encode() not in (sft / "adapter" / name).read_bytes()
    reference = load_reference(base_model, sft)
    draw, base = torch.Generator().manual_seed(1), tiny_model()
    for name, weight in base.named_parameters():
        expected = weight + 0.05 * torch.randn(weight.shape, generator=draw)
        assert torch.equal(reference.get_parameter(name), expected), name
    assert not any(weight.requires_grad for weight in reference.parameters())


def test_a_policy_of_all_parameters_needs_its_reference_beside_it_and_an_adapter_does_not(base_model, tmp_path):
    sft = trained_model(base_model, tmp_path / "sft", seed=1)
    full, adapter = trained_model(base_model, tmp_path / "ppo", seed=2), trained_adapter(base_model, tmp_path / "dpo")
    policy, adapted = load_policy(base_model, sft, full), load_policy(base_model, sft, adapter)
    reference = load_reference(base_model, sft)(IDS).logits
    assert not torch.allclose(policy(IDS).logits, reference)
    assert torch.equal(load_beside(base_model, sft, policy)(IDS).logits, reference)
    assert load_beside(base_model, sft, policy.half()).dtype is torch.float16, "its precision is the policy's"
    assert load_beside(base_model, sft, adapted) is None
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(IDS).logits, reference, rtol=1e-6, atol=1e-6)


def test_weights_of_either_kind_replace_the_other(base_model, tmp_path):
    trained_model(base_model, trained_adapter(base_model, tmp_path / "sft"), seed=1)
    assert has_all_parameters(tmp_path / "sft")
    assert not (tmp_path / "sft" / "adapter" / "adapter_config.json").exists()
    trained_adapter(base_model, tmp_path / "sft")
    assert not has_all_parameters(tmp_path / "sft")
    assert not (tmp_path / "sft" / "adapter" / "model.safetensors").exists()


def test_stages_with_a_policy_are_known_by_what_they_wrote(base_model, tmp_path):
    trained_model(base_model, tmp_path / "sft", seed=1)
    trained_adapter(base_model, tmp_path / "ppo")
    save_weights(make_trainable(new_reward_model(base_model, None, seed=0), None, seed=0), tmp_path / "reward_model")
    save_weights(add_lora(new_reward_model(base_model, None, seed=0), LORA, seed=0, head="score"), tmp_path / "judge")
    assert policy_stages(tmp_path) == ["ppo", "sft"]


def test_tied_embeddings_are_trained_and_saved_as_one(tmp_path):
    config = tiny_model().config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base_model" / "model")
    model = make_trainable(load_reference(tmp_path / "base_model", None), None, seed=0)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.lm_head.weight.data += 1
    save_weights(model, tmp_path / "sft")
    loaded = load_reference(tmp_path / "base_model", tmp_path / "sft")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("heads", [1, 2])
def test_a_scorer_of_all_parameters_comes_back_as_it_was_saved(heads, base_model, tmp_path):
    scorer = make_trainable(new_reward_model(base_model, None, seed=3, heads=heads), None, seed=3, head="score")
    for weight in scorer.parameters():
        weight.data += 0.05
    expected = scorer.eval()(IDS).logits
    save_weights(scorer, tmp_path / "scorer")
    loaded = load_reward_model(base_model, None, tmp_path / "scorer", heads=heads)
    torch.testing.assert_close(loaded(IDS).logits, expected)
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())


def test_all_that_stays_is_below_the_first_layer_and_the_line_counts_what_is_trained(base_model, capsys):
    """A layer has 2 · 32 · 32 (q, o) + 2 · 16 · 32 (k, v) + 3 · 32 · 64 (MLP) + 2 · 32 (norms) = 9,280 weights, the
    scorer two of them, 32 · 32 of embeddings, a norm of 32, and a head of 32."""
    scorer = make_trainable(new_reward_model(base_model, None, seed=0), None, seed=0, head="score", first_layer=1)
    trained = {name for name, weight in scorer.named_parameters() if weight.requires_grad}
    assert trained == {name for name, _ in scorer.named_parameters() if "layers.0" not in name and "embed" not in name}
    printed = capsys.readouterr().err
    assert "LlamaForSequenceClassification: 9,344 of 19,648 parameters are trained; 0.1 MB for each copy" in printed
    make_trainable(load_reference(base_model, None), None, seed=0)
    assert "20,640 of 20,640 parameters" in capsys.readouterr().err
    with pytest.raises(ModelError, match="first_layer is 2, but the model has 2 layers"):
        make_trainable(new_reward_model(base_model, None, seed=0), None, seed=0, head="score", first_layer=2)
