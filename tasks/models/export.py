"""Export a policy as a folder that transformers, with or without peft, loads without this project."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tasks.core.errors import ConfigError, ModelError
from tasks.models.encoding import encode_prompt
from tasks.models.loading import (
    ADAPTER_DIR,
    device,
    has_all_parameters,
    init_process,
    load_policy,
    load_reference,
    load_tokenizer,
)

__all__ = ["ExportCheck", "atomic_folder", "export"]

BASE_DIR = "base"  # folder of an exported adapter's base model, beside the folder `adapter`
TOLERANCE_EPS = 1024  # in rounding errors (eps): the exported model adds up the same products in another order


@dataclass(frozen=True)
class ExportCheck:
    """Comparison of the exported model's logits with the policy's."""

    dtype: str  # of the weights
    max_logit_difference: float  # the largest |Δ logit| to the policy as it was evaluated
    max_logit: float  # the largest |logit|


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `folder` on success; ConfigError if something is in there already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty: name a folder that is, or a new one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        content = Path(temporary) / "content"
        content.mkdir()
        yield content
        for path in content.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors leaves files that only their owner may read
        content.replace(folder)


def export(
    artifacts: Path,
    policy: str,
    folder: Path,
    *,
    adapter: bool,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float,
) -> ExportCheck:
    """Write the policy as one model, or as the merged SFT model and the adapter on it; then load and compare.

    Args:
        artifacts: base model, SFT and policy, laid out as in artifacts.
        prompts: on which logits are compared.
        max_new_tokens, temperature: of the policy's training, for `generate` of transformers.

    Raises:
        ConfigError: an adapter is asked for, but all parameters were trained.
        ModelError: a part is incomplete, or the exported model does not compute what the policy does.
    """
    init_process()
    base_model, sft = artifacts / "base_model", artifacts / "sft"
    if adapter and has_all_parameters(artifacts / policy):
        raise ConfigError(f"{policy} was trained in all parameters, so it has no adapter: export without --adapter")
    tokenizer, trained = load_tokenizer(base_model), cast(Any, load_policy(base_model, sft, artifacts / policy))
    batches = [torch.tensor([encode_prompt(tokenizer, prompt)], device=device()) for prompt in prompts]
    expected = _logits(trained, batches)
    exported: Any = trained
    if adapter:
        exported = load_reference(base_model, sft)
    elif isinstance(trained, PeftModel):
        exported = trained.merge_and_unload()
    exported.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    base = folder / BASE_DIR if adapter else folder
    exported.save_pretrained(base)
    tokenizer.save_pretrained(base)
    if adapter:
        shutil.copytree(artifacts / policy / ADAPTER_DIR, folder / ADAPTER_DIR)
        file = folder / ADAPTER_DIR / "adapter_config.json"
        config = json.loads(file.read_text(encoding="utf-8")) | {"base_model_name_or_path": BASE_DIR}
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return _check_logits(expected, _logits(_load(folder, adapter), batches), exported.dtype)


def _load(folder: Path, adapter: bool) -> Any:
    """Load without this project's code."""
    base = folder / BASE_DIR if adapter else folder
    AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if adapter:
        model = PeftModel.from_pretrained(model, folder / ADAPTER_DIR)
    return model.to(device()).eval()


@torch.no_grad()
def _logits(model: Any, batches: Sequence[Tensor]) -> list[Tensor]:
    return [model(input_ids=ids).logits.float() for ids in batches]


def _check_logits(expected: Sequence[Tensor], actual: Sequence[Tensor], dtype: torch.dtype) -> ExportCheck:
    difference = max((a - b).abs().max().item() for a, b in zip(expected, actual, strict=True))
    max_logit = max(logits.abs().max().item() for logits in expected)
    tolerance = TOLERANCE_EPS * torch.finfo(dtype).eps * max_logit
    if not difference <= tolerance:
        raise ModelError(
            f"the exported model's logits differ from the policy's by up to {difference:.2g}, rounding explains "
            f"{tolerance:.2g}: the versions of transformers and peft here may not fit each other; nothing was written"
        )
    return ExportCheck(str(dtype).removeprefix("torch."), difference, max_logit)
