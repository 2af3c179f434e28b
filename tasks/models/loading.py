"""Load and save models: the base model, LoRA adapters or all parameters, and linear heads; pad their inputs.

The *reference* is the base model with the SFT adapter merged, and a policy one adapter on top; switching that off gives
back the reference. Where all parameters are trained, SFT and policies are models of their own. A stage's folder of
weights holds the one or the other, and loading goes by what is there.
"""

from __future__ import annotations

import ctypes
import json
import re
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
from tasks.core.terminal import print_line
from tasks.models.encoding import context_length
from tasks.models.onednn_linear import freeze_for_onednn, register_frozen_lora

if TYPE_CHECKING:
    from tasks.config.training import LoraParams

__all__ = [
    "add_adapter", "add_lora", "device", "dtype", "has_all_parameters", "init_process", "is_disabled", "linear_modules",
    "load_beside", "load_context", "load_policy", "load_reference", "load_reward_model", "load_tokenizer",
    "make_trainable", "new_reward_model", "pad_ids", "policy_stages", "position_ids", "save_weights",
]  # fmt: skip

ADAPTER_DIR = "adapter"  # of a stage's weights: an adapter, or all parameters
MODEL_DIR = "model"


def device() -> torch.device:
    """This rank's GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_disabled(stage: Path) -> bool:
    """Whether the stage that wrote this folder is switched off, so that there are no weights to load."""
    return (stage / ADAPTER_DIR / DISABLED_MARKER).is_file()


def has_all_parameters(stage: Path) -> bool:
    """Whether the stage that wrote this folder trained all parameters, and no adapter."""
    return (stage / ADAPTER_DIR / "config.json").is_file()


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
    """The base model with the SFT adapter merged, or the model that SFT wrote.

    It is in evaluation mode and frozen: float32 on CPU, bfloat16 on a GPU.
    """
    folder = _require_file(base_model / MODEL_DIR, "config.json")
    if sft is not None and has_all_parameters(sft):
        folder, sft = sft / ADAPTER_DIR, None
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype())
    if sft is not None:
        adapter = _require_file(sft / ADAPTER_DIR, "adapter_config.json")
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.to(device())
    freeze_for_onednn(model)
    return model.eval()


def load_policy(base_model: Path, sft: Path, stage: Path) -> PeftModel | PreTrainedModel:
    """The reference with the adapter that a policy stage trained, switched on; or the model that it wrote."""
    if has_all_parameters(stage):
        return load_reference(base_model, stage)
    return _load_adapter(load_reference(base_model, sft), stage)


def load_beside(base_model: Path, sft: Path, policy: Any) -> PreTrainedModel | None:
    """The reference beside a policy of all parameters, in its precision; None: the policy is an adapter on it."""
    return None if isinstance(policy, PeftModel) else load_reference(base_model, sft).to(policy.dtype)


def policy_stages(folder: Path) -> list[str]:
    """Stages whose weights are a causal language model, in a folder laid out as the artifacts."""
    kinds: dict[str, str] = {}
    for name, key in (("adapter_config.json", "task_type"), ("config.json", "architectures")):
        for file in folder.glob(f"*/{ADAPTER_DIR}/{name}"):
            kinds[file.parts[-3]] = str(json.loads(file.read_text(encoding="utf-8"))[key])
    return sorted(stage for stage, kind in kinds.items() if not re.search("SEQ_CLS|SequenceClassification", kind))


def make_trainable(
    model: PreTrainedModel, lora: LoraParams | None, *, seed: int, head: str | None = None, first_layer: int = 0
) -> PeftModel | PreTrainedModel:
    """The model with a fresh adapter, see `add_lora`; without `lora` the model itself, all of it trained in float32.

    Its embeddings and the layers below `first_layer`, if that is not 0, stay as they are. A line says how many
    parameters are trained, and the bytes that a snapshot and Adam's moments take.
    """
    if lora:
        return add_lora(model, lora, seed=seed, head=head, first_layer=first_layer)
    model.float().requires_grad_(True)  # type: ignore[no-untyped-call]
    if first_layer:
        trained_layers = _layers_from(model, first_layer)
        for name, module in model.named_modules():
            layer = next((int(part) for part in name.split(".") if part.isdigit()), first_layer)
            if layer not in trained_layers or isinstance(module, torch.nn.Embedding):
                module.requires_grad_(False)
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
    if distributed.rank() == 0:
        print_line(
            f"{type(model).__name__}: {trained:,} of {total:,} parameters are trained; {4 * total / 1e6:,.1f} MB for "
            f"each copy of the weights on the disk, {8 * trained / 1e6:,.1f} MB for the optimiser, there and in memory"
        )
    return model


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
        if config.target_modules == "all-linear":
            config.target_modules = set(linear_modules(model))
        config.layers_to_transform = _layers_from(model, first_layer)
    return get_peft_model(model, config)


def _layers_from(model: PreTrainedModel, first_layer: int) -> list[int]:
    """Numbers of the layers from this one on; ModelError if there is none."""
    layers = int(model.config.num_hidden_layers)
    if first_layer >= layers:
        raise ModelError(f"lora_first_layer is {first_layer}, but the model has {layers} layers; choose one below")
    return list(range(first_layer, layers))


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
    model = _load_classifier(base_model / MODEL_DIR, heads)
    setattr(model, backbone_name, getattr(reference, backbone_name))
    model.config.pad_token_id = load_tokenizer(base_model).pad_token_id
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(model.score.weight.shape, generator=generator) / (model.config.hidden_size + 1) ** 0.5
    model.score.weight.data.copy_(weight)
    return model.to(device())


def _load_classifier(folder: Path, heads: int) -> Any:
    try:
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=heads, dtype=dtype(), ignore_mismatched_sizes=True
        )
    except ValueError as error:
        raise ModelError(f"{folder}: transformers can put no score on this architecture: {error}") from error
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise ModelError(f"{folder}: {type(model).__name__} has no linear layer `score`; choose a decoder as the model")
    return model


def load_reward_model(
    base_model: Path, sft: Path | None, stage: Path, *, heads: int = 1
) -> PeftModel | PreTrainedModel:
    """Load a trained reward model (backbone, adapter and heads, or the model as a whole) in evaluation mode."""
    if has_all_parameters(stage):
        model = _load_classifier(stage / ADAPTER_DIR, heads).to(device())
        freeze_for_onednn(model)
        return model.eval()
    return _load_adapter(new_reward_model(base_model, sft, seed=0, heads=heads), stage)


def add_adapter(model: PeftModel, name: str, stage: Path) -> None:
    """Load another adapter, with its head if it has one, on the same backbone; `model.set_adapter` switches."""
    model.load_adapter(_require_file(stage / ADAPTER_DIR, "adapter_config.json"), name)


def _load_adapter(model: PreTrainedModel, stage: Path) -> PeftModel:
    folder = _require_file(stage / ADAPTER_DIR, "adapter_config.json")
    config = register_frozen_lora(LoraConfig.from_pretrained(str(folder)))
    return PeftModel.from_pretrained(model, folder, config=config).eval()


def save_weights(model: PeftModel | PreTrainedModel, out: Path) -> None:
    """Write what was trained so that equal weights are equal bytes on every machine: no paths, no set in random order.

    An adapter; or the model with all parameters as transformers lays it out. Files of earlier weights go; folders
    beside them stay.
    """
    folder = out / ADAPTER_DIR
    for file in folder.glob("*"):
        if file.is_file():
            file.unlink()
    if not isinstance(model, PeftModel):
        model.save_pretrained(folder)
        return
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
