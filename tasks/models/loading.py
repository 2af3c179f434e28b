"""Load and save models: the base model, LoRA adapters, and linear heads; pad their inputs.

A policy is always base model + SFT adapter, merged in memory (that sum is the *reference*), plus one adapter on top;
switching that adapter off gives back the reference.
"""

from __future__ import annotations

import ctypes
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import datasets
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from tasks.core import distributed
from tasks.core.errors import ModelError
from tasks.core.paths import DISABLED_MARKER
from tasks.models.encoding import context_length
from tasks.models.onednn_linear import freeze_for_onednn, register_frozen_lora

if TYPE_CHECKING:
    from tasks.config.training import LoraParams

__all__ = [
    "add_adapter", "add_lora", "device", "dtype", "init_process", "is_disabled", "linear_modules", "load_context",
    "load_policy", "load_reference", "load_reward_model", "load_tokenizer", "new_reward_model", "pad_ids",
    "policy_stages", "position_ids", "save_adapter",
]  # fmt: skip

ADAPTER_DIR = "adapter"
MODEL_DIR = "model"


def device() -> torch.device:
    """This rank's GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_disabled(stage: Path) -> bool:
    """Whether the stage that wrote this folder is switched off, so that there is no adapter to load."""
    return (stage / ADAPTER_DIR / DISABLED_MARKER).is_file()


def init_process() -> None:
    """Initialise the process group, silence the libraries' loading messages, and tune malloc for training.

    Training allocates and frees the same large tensors at every step; with glibc's defaults each of them is mapped
    and page-faulted anew (see mallopt(3)).
    """
    distributed.init_distributed()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    # peft and trl ask transformers for names that it is about to drop; a user can do nothing about it.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        trim_threshold, top_pad, mmap_max = -1, -2, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 64 * 2**20)


def load_tokenizer(base_model: Path) -> PreTrainedTokenizerBase:
    """The base model's tokenizer; ModelError where it has no end token, or no other padding token."""
    folder = _require_file(base_model / MODEL_DIR, "tokenizer.json")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise ModelError(
            f"{folder}: the tokenizer needs an end token and another padding token, got eos={tokenizer.eos_token!r} "
            f"pad={tokenizer.pad_token!r}; set base_model.pad_token in params.yaml"
        )
    return tokenizer


def load_context(base_model: Path) -> int | None:
    """Longest sequence of tokens that the base model can read; None where its configuration states none."""
    return context_length(AutoConfig.from_pretrained(_require_file(base_model / MODEL_DIR, "config.json")))


def load_reference(base_model: Path, sft: Path | None) -> PreTrainedModel:
    """The base model with the SFT adapter merged, in evaluation mode and frozen: float32 on CPU, bfloat16 on a GPU."""
    folder = _require_file(base_model / MODEL_DIR, "config.json")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype())
    if sft is not None:
        adapter = _require_file(sft / ADAPTER_DIR, "adapter_config.json")
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.to(device())
    freeze_for_onednn(model)
    return model.eval()


def load_policy(base_model: Path, sft: Path, stage: Path) -> PeftModel:
    """The reference with the adapter that a policy stage trained, switched on."""
    return _load_adapter(load_reference(base_model, sft), stage)


def policy_stages(folder: Path) -> list[str]:
    """Stages whose adapter is a causal language model, in a folder laid out as the artifacts."""
    configs = sorted(folder.glob(f"*/{ADAPTER_DIR}/adapter_config.json"))
    kinds = {file.parts[-3]: json.loads(file.read_text(encoding="utf-8"))["task_type"] for file in configs}
    return [stage for stage, kind in kinds.items() if kind == "CAUSAL_LM"]


def add_lora(
    model: PreTrainedModel, lora: LoraParams, *, seed: int, head: str | None = None, first_layer: int = 0
) -> PeftModel:
    """A fresh adapter on the model (B = 0, so the function is unchanged).

    Args:
        head: the name of a module that is trained in full beside the adapter.
        first_layer: layers below it get no adapter; ModelError where the model has no such layer.
    """
    torch.manual_seed(seed)
    config = lora_config(model, lora, head)
    if first_layer:
        layers = int(model.config.num_hidden_layers)
        if first_layer >= layers:
            raise ModelError(f"lora_first_layer is {first_layer}, but the model has {layers} layers; choose one below")
        if config.target_modules == "all-linear":
            config.target_modules = set(linear_modules(model))
        config.layers_to_transform = list(range(first_layer, layers))
    return get_peft_model(model, config)


def lora_config(model: PreTrainedModel, lora: LoraParams, head: str | None = None) -> LoraConfig:
    """The PEFT configuration for the shared LoRA section; no dropout, so that ratios start at exactly 1.

    Raises:
        ModelError: the model lacks a module that the section names; PEFT would adapt the others in silence.
    """
    names, key = (
        (lora.reward_model_modules, "reward_model_modules") if head else (lora.target_modules, "target_modules")
    )
    known = linear_modules(model)
    if unknown := [] if isinstance(names, str) else [name for name in names if name not in known]:
        raise ModelError(
            f"lora.{key} names {', '.join(unknown)}, which {type(model).__name__} does not have; its linear modules "
            f"are {', '.join(known)}"
        )
    transposed = any(isinstance(module, Conv1D) for module in model.modules())  # GPT-2's layers
    saved, task = ([head], TaskType.SEQ_CLS) if head else (None, TaskType.CAUSAL_LM)
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0, modules_to_save=saved, task_type=task,
        target_modules=names if isinstance(names, str) else list(names), fan_in_fan_out=transposed,
    )  # fmt: skip
    return register_frozen_lora(config)


def linear_modules(model: PreTrainedModel) -> list[str]:
    """Names of the linear modules of the backbone's numbered layers, which LoRA can adapt."""
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and any(part.isdigit() for part in name.split("."))
    }
    return sorted(names)


def new_reward_model(base_model: Path, sft: Path | None, *, seed: int, heads: int = 1) -> PreTrainedModel:
    """The reference's backbone with fresh linear heads `score`, N(0, 1/√(d+1)) (Ziegler et al. 2019, section 2.1)."""
    reference = load_reference(base_model, sft)
    backbone_name = reference.base_model_prefix
    model = _load_classifier(base_model, heads)
    setattr(model, backbone_name, getattr(reference, backbone_name))
    model.config.pad_token_id = load_tokenizer(base_model).pad_token_id
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(model.score.weight.shape, generator=generator) / (model.config.hidden_size + 1) ** 0.5
    model.score.weight.data.copy_(weight)
    return model.to(device())


def _load_classifier(base_model: Path, heads: int) -> Any:
    folder = base_model / MODEL_DIR
    try:
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=heads, dtype=dtype(), ignore_mismatched_sizes=True
        )
    except ValueError as error:
        raise ModelError(f"{folder}: transformers can put no score on this architecture: {error}") from error
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise ModelError(f"{folder}: {type(model).__name__} has no linear layer `score`; choose a decoder as the model")
    return model


def load_reward_model(base_model: Path, sft: Path | None, stage: Path, *, heads: int = 1) -> PeftModel:
    """Load a trained reward model (backbone, adapter and heads) in evaluation mode."""
    return _load_adapter(new_reward_model(base_model, sft, seed=0, heads=heads), stage)


def add_adapter(model: PeftModel, name: str, stage: Path) -> None:
    """Load another adapter, with its head if it has one, on the same backbone; `model.set_adapter` switches."""
    model.load_adapter(_require_file(stage / ADAPTER_DIR, "adapter_config.json"), name)


def _load_adapter(model: PreTrainedModel, stage: Path) -> PeftModel:
    folder = _require_file(stage / ADAPTER_DIR, "adapter_config.json")
    config = register_frozen_lora(LoraConfig.from_pretrained(str(folder)))
    return PeftModel.from_pretrained(model, folder, config=config).eval()


def save_adapter(model: PeftModel, out: Path) -> None:
    """Write the adapter so that equal weights are equal bytes on every machine: no paths, no set in random order.

    Files of an earlier adapter go; folders beside them stay.
    """
    folder = out / ADAPTER_DIR
    for file in folder.glob("*"):
        if file.is_file():
            file.unlink()
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "base_model"
    config = {key: sorted(value) if _is_string_list(value) else value for key, value in sorted(config.items())}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _is_string_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def dtype() -> torch.dtype:
    """The dtype of models on this machine."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def _require_file(folder: Path, file: str) -> Path:
    if not (folder / file).is_file():
        found = ", ".join(sorted(path.name for path in folder.glob("*"))) or "nothing"
        raise ModelError(f"{folder}: no {file} (found: {found}); run the stage that writes it, or check the folder")
    return folder


def pad_ids(
    rows: Sequence[Sequence[int]], pad_token_id: int, *, side: Literal["left", "right"]
) -> tuple[Tensor, Tensor]:
    """Pad token ids to [B, T]; the mask [B, T] is true on those of the rows."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    masks = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    ids = pad_sequence(tensors, batch_first=True, padding_value=pad_token_id, padding_side=side)
    return ids, pad_sequence(masks, batch_first=True, padding_side=side)


def position_ids(mask: Tensor) -> Tensor:
    """cumsum(mask) − mask: the first real token has position 0 whatever the padding before it."""
    return mask.long().cumsum(-1) - mask.long()
