"""Stage base_model: the pre-trained language model as one plain folder, whatever it came from.

Writes `model/` (config, fp16 weights, tokenizer with a padding token that is not its end token) and `card.json`.
Equal parameters give equal bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tasks.core.errors import ModelError
from tasks.core.files import write_json
from tasks.core.models import prepare_process
from tasks.core.sections.base_model import BaseModelParams
from tasks.data.model_readers import READERS

__all__ = ["base_model"]

_MACHINE_KEYS = (
    "name_or_path",
    "model_name_or_path",
    "local_files_only",
    "is_local",
    "gguf_file",
    "cache_dir",
    "tokenizer_file",
)


def base_model(params: BaseModelParams, seed: int, *, out: Path) -> None:
    """Fetch, convert or build the model and its tokenizer.

    Args:
        params: which model.
        seed: decides the weights of kind `random`; of no effect otherwise.
        out: receives `model/` and `card.json`.

    Raises:
        ModelError: the model or its tokenizer is incomplete, or there is no usable padding token.
        SourceError: it could not be fetched, or its checksum differs.
    """
    prepare_process()
    model, tokenizer, origin = READERS[params.kind](params, seed)
    _set_padding(model, tokenizer, params.pad_token)
    folder = out / "model"
    _save(model, tokenizer, folder)
    parameters = sum(weight.numel() for weight in model.parameters())
    counts = {"parameters": parameters, "vocabulary": len(tokenizer), "layers": model.config.num_hidden_layers}
    facts = {"licence": params.licence, "tokens": _tokens(tokenizer)}
    write_json(out / "card.json", {"kind": params.kind, **origin, **facts, **counts})


def _set_padding(model: Any, tokenizer: Any, pad_token: str) -> None:
    """Give the tokenizer a padding token that cannot be mistaken for the end of a response."""
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end token, so a response could never end; choose another base_model")
    if pad_token:
        if pad_token not in tokenizer.get_vocab():
            raise ModelError(
                f"base_model.pad_token {pad_token!r} is not in the tokenizer's vocabulary; name one that is"
            )
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        special = ", ".join(sorted(set(tokenizer.all_special_tokens) - {tokenizer.eos_token})) or "none"
        raise ModelError(
            f"the tokenizer's padding token is {tokenizer.pad_token!r} and its end token {tokenizer.eos_token!r}: set "
            f"base_model.pad_token to another token of its vocabulary (special ones: {special})"
        )
    for config in (model.config, model.generation_config):
        if config is not None:
            config.pad_token_id = tokenizer.pad_token_id
            config.eos_token_id = tokenizer.eos_token_id


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write both without anything that differs between machines: no paths, plain file modes."""
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        _plain_json(folder / name)
    for path in folder.iterdir():
        path.chmod(0o644)


def _plain_json(path: Path) -> None:
    """Sort the keys and drop those that tell where the model lay on this machine."""
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in sorted(content.items()) if key.lstrip("_") not in _MACHINE_KEYS}
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokens(tokenizer: Any) -> dict[str, str]:
    return {"end": str(tokenizer.eos_token), "padding": str(tokenizer.pad_token)}


if __name__ == "__main__":
    from tasks.core.stage import run_stage

    run_stage("base_model")
