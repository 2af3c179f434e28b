"""Save a language model and its tokenizer such that equal models are equal bytes on every machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tasks.core.errors import ModelError

__all__ = ["save_model", "set_padding"]

_MACHINE_KEYS = (
    "name_or_path",
    "model_name_or_path",
    "local_files_only",
    "is_local",
    "gguf_file",
    "cache_dir",
    "tokenizer_file",
)


def set_padding(model: Any, tokenizer: Any, pad_token: str) -> None:
    """Set a padding token that differs from the end token.

    Raises:
        ModelError: there is no end token, or no usable padding token.
    """
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


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save model and tokenizer without machine-dependent content: no paths, plain file modes."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        _plain_json(folder / name)
    for path in folder.iterdir():
        path.chmod(0o644)


def _plain_json(path: Path) -> None:
    """Sort the keys and drop those that hold paths of this machine."""
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in sorted(content.items()) if key.lstrip("_") not in _MACHINE_KEYS}
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
