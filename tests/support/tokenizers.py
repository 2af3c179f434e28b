"""A base model's folder with nothing in it but a tokenizer, for stages that only count tokens."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

__all__ = ["write_tokenizer"]


def write_tokenizer(base_model: Path) -> Path:
    """Write a tokenizer with a token a word or mark; return the folder of the base model."""
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1, "<start>": 2, "<word>": 3}, unk_token="<word>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")
    tokenizer.save_pretrained(base_model / "model")
    (base_model / "model" / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 4096}')
    return base_model
