"""Frozen linear layers, with or without a LoRA adapter, computed by oneDNN: faster than MKL on a CPU.

Torch hands float32 products to MKL, which rearranges both factors at every call; for the few rows of a decoding step
that costs more than the product. oneDNN takes weights as they are, or rearranged once. A low-rank adapter is added to
the output in place. The numbers are the same but for the order of additions. On a GPU, in another precision, for
weights that are trained, and where torch was built without oneDNN, every layer works as before.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["FrozenLinear", "freeze_for_onednn", "merged_weights", "register_frozen_lora"]

PACK_ROWS = 16  # for which the layout of packed weights is chosen; it serves other numbers of rows as well

_onednn = torch.ops.mkldnn


def freeze_for_onednn(model: nn.Module) -> None:
    """Freeze all parameters and compute the linear layers by oneDNN."""
    model.requires_grad_(False)
    for module in model.modules():
        if type(module) is nn.Linear and _onednn_supports(module.weight):
            module.__class__ = FrozenLinear


def register_frozen_lora(config: LoraConfig) -> LoraConfig:
    """Let PEFT put `FrozenLora` around the layers that `freeze_for_onednn` has changed."""
    config._register_custom_module({FrozenLinear: FrozenLora})
    return config


@contextmanager
def merged_weights(model: nn.Module) -> Iterator[None]:
    """Temporarily use packed weights with the adapters merged in: for decoding, without gradients.

    It takes the memory of the model's linear layers once more, and pays where the model is then called often on few
    rows. The weights must not change meanwhile.
    """
    adapters = {module.base_layer: module for module in model.modules() if isinstance(module, FrozenLora)}
    layers = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    try:
        for layer in layers:
            layer.packed = _pack_weight(layer.weight if layer not in adapters else adapters[layer].merged_weight())
        yield
    finally:
        for layer in layers:
            layer.packed = None


class FrozenLinear(nn.Linear):
    """A linear layer whose weight gets no gradient."""

    packed: Tensor | None = None
    """The weight, or its sum with an adapter, as oneDNN wants it; see `merged_weights`."""

    def forward(self, inputs: Tensor) -> Tensor:
        if self.packed is not None:
            return _linear(inputs, self.packed, self.bias)
        if self.weight.requires_grad or not _onednn_supports(self.weight):
            return super().forward(inputs)
        if inputs.requires_grad and torch.is_grad_enabled():
            return cast(Tensor, _FrozenLinearFunction.apply(inputs, self.weight, self.bias))  # type: ignore[no-untyped-call]
        return _linear(inputs, self.weight, self.bias)


class FrozenLora(LoraLinear):
    """A low-rank adapter on a `FrozenLinear`: y = x·Wᵀ + b + (x·Aᵀ)·Bᵀ·α/r (Hu et al. 2021, arXiv 2106.09685)."""

    base_layer: FrozenLinear

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.base_layer
        if layer.packed is not None:
            return layer(x)
        simple = not (self.disable_adapters or args or kwargs) and self._is_simple_adapter()
        if not (simple and _onednn_supports(layer.weight)):
            return cast(Tensor, super().forward(x, *args, **kwargs))
        down, up, scaling = self._factors()
        result = _FrozenLoraFunction.apply(x, layer.weight, layer.bias, down, up, scaling)  # type: ignore[no-untyped-call]
        return cast(Tensor, result)

    def merged_weight(self) -> Tensor:
        """W + B·A·α/r, or W while the adapter is off."""
        weight = self.base_layer.weight
        if self.disable_adapters:
            return weight
        if not self._is_simple_adapter():
            return weight + sum(self.get_delta_weight(name) for name in self.active_adapters)
        down, up, scaling = self._factors()
        return torch.addmm(weight, up, down, alpha=scaling)

    def _is_simple_adapter(self) -> bool:
        """Whether there is one adapter, without dropout and variants, that is not merged into the weight."""
        names = self.active_adapters
        return (
            len(names) == 1
            and names[0] not in self.lora_variant
            and isinstance(self.lora_dropout[names[0]], nn.Identity)
            and self.lora_A[names[0]].weight.dtype == torch.float32
            and not self.merged
        )

    def _factors(self) -> tuple[Tensor, Tensor, float]:
        (name,) = self.active_adapters
        return self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]


class _FrozenLinearFunction(torch.autograd.Function):
    """Autograd function of y = x·Wᵀ + b with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _linear(grad, weight.t()), None, None


class _FrozenLoraFunction(torch.autograd.Function):
    """Autograd function of `FrozenLora`: gradients for x, A and B."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        hidden = _linear(_rows(inputs), down)
        result = _linear(inputs, weight, bias)
        _rows(result).addmm_(hidden, up.t(), alpha=scaling)
        ctx.save_for_backward(inputs, weight, down, up, hidden)
        ctx.scaling = scaling
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        inputs, weight, down, up, hidden = ctx.saved_tensors
        grad = grad.contiguous()
        grad_hidden = _linear(_rows(grad), up.t()).mul_(ctx.scaling)
        grad_up = _linear(hidden.t(), _rows(grad).t()).mul_(ctx.scaling).t()
        grad_down = _linear(grad_hidden.t(), _rows(inputs).t())
        grad_inputs = None
        if ctx.needs_input_grad[0]:
            grad_inputs = _linear(grad, weight.t())
            _rows(grad_inputs).addmm_(grad_hidden, down)
        return grad_inputs, None, None, grad_down, grad_up, None


@torch.no_grad()
def _pack_weight(weight: Tensor) -> Tensor:
    return _onednn._reorder_linear_weight(weight.detach(), PACK_ROWS)


def _onednn_supports(weight: Tensor) -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and weight.device.type == "cpu" and weight.dtype == torch.float32


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute inputs·weightᵀ + bias."""
    return _onednn._linear_pointwise(inputs, weight, bias, "none", [], "")


def _rows(tensor: Tensor) -> Tensor:
    """[..., d] → [N, d]."""
    return tensor.reshape(-1, tensor.shape[-1])
