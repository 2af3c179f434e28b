"""Frozen linear layers by oneDNN against torch's own."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tasks.models.onednn_linear import FrozenLinear, FrozenLora, freeze_for_onednn, merged_weights, register_frozen_lora
from tests.conftest import tiny_model
from tests.support.tiny_trainer import moved_policy

IDS = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6]])


def close(result: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (16,), (3, 7)])
def test_output_and_gradient_equal_those_of_a_plain_layer(rows, bias):
    torch.manual_seed(0)
    plain = nn.Linear(24, 40, bias=bias).requires_grad_(False)
    ours = nn.Linear(24, 40, bias=bias)
    ours.load_state_dict(plain.state_dict())
    freeze_for_onednn(ours)
    assert isinstance(ours, FrozenLinear)
    first = torch.randn(*rows, 24, requires_grad=True)
    second = first.detach().clone().requires_grad_()
    upstream = torch.randn(*rows, 40)
    plain(first).backward(upstream)
    ours(second).backward(upstream)
    close(ours(second), plain(first))
    close(second.grad, first.grad)
    with torch.no_grad():
        close(ours(second), plain(first))


def test_trained_layers_and_other_precisions_stay_with_torch():
    trained = nn.Linear(4, 4)
    freeze_for_onednn(trained)
    trained.requires_grad_(True)
    trained(torch.ones(2, 4)).sum().backward()
    close(trained.weight.grad, torch.full((4, 4), 2.0))
    half = nn.Linear(4, 4, dtype=torch.bfloat16)
    freeze_for_onednn(half)
    assert type(half) is nn.Linear
    assert not half.weight.requires_grad
    wide = nn.Linear(4, 4)
    freeze_for_onednn(wide)
    wide.double()
    inputs = torch.ones(2, 4).double()
    close(wide(inputs), nn.functional.linear(inputs, wide.weight, wide.bias))


def test_merged_is_the_model_with_its_adapter_and_leaves_no_trace():
    policy = moved_policy()
    with torch.no_grad():
        adapted = policy(IDS).logits
        with policy.disable_adapter():
            reference = policy(IDS).logits
        before = {name: value.clone() for name, value in policy.state_dict().items()}
        with merged_weights(policy):
            close(policy(IDS).logits, adapted)
        with policy.disable_adapter(), merged_weights(policy):
            close(policy(IDS).logits, reference)
        assert (adapted - reference).abs().max() > 0.1, "the adapter must change something, or nothing is tested"
        assert torch.equal(policy(IDS).logits, adapted)
    for name, value in policy.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_merged_follows_the_adapter_and_ends_on_errors():
    policy = moved_policy()
    with torch.no_grad():
        with pytest.raises(KeyError), merged_weights(policy):
            raise KeyError
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1)
        with merged_weights(policy):
            inside = policy(IDS).logits
        close(inside, policy(IDS).logits)


@pytest.mark.parametrize("fast", [True, False])
def test_merged_takes_any_mixture_of_layers(fast):
    """Layers that are not frozen by us, or with PEFT's own adapters, work as they are."""
    model = tiny_model()
    if fast:
        freeze_for_onednn(model)
    policy = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    with torch.no_grad():
        expected = policy(IDS).logits
        with merged_weights(policy):
            close(policy(IDS).logits, expected)


def test_adapted_layer_and_its_gradients_equal_those_of_peft():
    torch.manual_seed(0)
    ours, theirs = tiny_model(), tiny_model()
    freeze_for_onednn(ours)
    modules = ["q_proj", "v_proj", "down_proj", "lm_head"]
    config = LoraConfig(r=3, lora_alpha=7, target_modules=modules, init_lora_weights=False)
    peft = get_peft_model(theirs, config)
    fast = get_peft_model(ours, register_frozen_lora(LoraConfig(r=3, lora_alpha=7, target_modules=modules)))
    assert sum(isinstance(module, FrozenLora) for module in fast.modules()) == 7
    assert not any(isinstance(module, FrozenLora) for module in peft.modules())
    fast.load_state_dict(peft.state_dict())
    for policy in (peft, fast):
        policy(IDS).logits.square().sum().backward()
    close(fast(IDS).logits, peft(IDS).logits)
    gradients = {name: value.grad for name, value in peft.named_parameters() if value.requires_grad}
    assert len(gradients) == 14
    for name, value in fast.named_parameters():
        if name in gradients:
            torch.testing.assert_close(value.grad, gradients[name], rtol=1e-4, atol=1e-3)
