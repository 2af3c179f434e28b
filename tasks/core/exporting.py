"""A policy as a folder that transformers, with or without peft, loads without this project."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tasks.core.errors import ConfigError, ModelError
from tasks.core.models import ADAPTER, device, load_policy, load_reference, load_tokenizer, prepare_process

__all__ = ["ADAPTER", "BASE", "Exported", "empty_folder", "export"]

BASE = "base"
"""Where an exported adapter's base model lies, beside the folder `adapter`."""

SLACK = 1024
"""The exported model adds up the same products in another order; its logits may differ by so many rounding errors."""


@dataclass(frozen=True)
class Exported:
    """What was measured on the folder, loaded again.

    Attributes:
        dtype: of the weights.
        difference: the largest |Δ logit| to the policy as it was evaluated.
        scale: the largest |logit|.
    """

    dtype: str
    difference: float
    scale: float


@contextmanager
def empty_folder(folder: Path) -> Iterator[Path]:
    """A draft beside the folder, which takes its name if all goes well, so that there is never half an export.

    Raises:
        ConfigError: there is something in the folder already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty: name a folder that is, or a new one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as draft:
        content = Path(draft) / "content"
        content.mkdir()
        yield content
        for path in content.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors leaves files that only their owner may read
        content.replace(folder)


def export(
    parts: Path,
    policy: str,
    folder: Path,
    *,
    adapter: bool,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float,
) -> Exported:
    """Write the policy as one merged model, or as the merged SFT model and the adapter on it; then load and compare.

    Args:
        parts: base model, SFT and policy, laid out as in artifacts.
        folder: an empty one.
        prompts: on which logits are compared.
        max_new_tokens, temperature: how the policy was trained to write, for `generate` of transformers.

    Raises:
        ModelError: a part is incomplete, or the exported model does not compute what the policy does.
    """
    prepare_process()
    tokenizer = load_tokenizer(parts / "base_model")
    trained: Any = load_policy(parts / "base_model", parts / "sft", parts / policy)
    batches = [torch.tensor([tokenizer(prompt).input_ids], device=device()) for prompt in prompts]
    wanted = _logits(trained, batches)
    writes = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    plain: Any = load_reference(parts / "base_model", parts / "sft") if adapter else trained.merge_and_unload()
    plain.generation_config = writes
    base = folder / BASE if adapter else folder
    plain.save_pretrained(base)
    tokenizer.save_pretrained(base)
    if adapter:
        _copy_adapter(parts / policy / ADAPTER, folder / ADAPTER)
    return _checked(wanted, _logits(_load(folder, adapter), batches), plain.dtype)


def _copy_adapter(adapter: Path, to: Path) -> None:
    shutil.copytree(adapter, to)
    file = to / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"base_model_name_or_path": BASE}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _load(folder: Path, adapter: bool) -> Any:
    """As somebody else would."""
    base = folder / BASE if adapter else folder
    AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if adapter:
        model = PeftModel.from_pretrained(model, folder / ADAPTER)
    return model.to(device()).eval()


@torch.no_grad()
def _logits(model: Any, batches: Sequence[Tensor]) -> list[Tensor]:
    return [model(input_ids=ids).logits.float() for ids in batches]


def _checked(wanted: Sequence[Tensor], found: Sequence[Tensor], dtype: torch.dtype) -> Exported:
    difference = max((a - b).abs().max().item() for a, b in zip(wanted, found, strict=True))
    scale = max(logits.abs().max().item() for logits in wanted)
    most = SLACK * torch.finfo(dtype).eps * scale
    if not difference <= most:
        raise ModelError(
            f"the exported model's logits differ from the policy's by up to {difference:.2g}, rounding explains "
            f"{most:.2g}: the versions of transformers and peft here may not fit each other; nothing was written"
        )
    return Exported(str(dtype).removeprefix("torch."), difference, scale)
