"""Fixtures that several test folders share: a model small enough to train in a test."""

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tasks.models.onednn_linear import freeze_for_onednn, register_frozen_lora
from tests.support.tables import (  # noqa: F401 - hooks
    pytest_configure,
    pytest_runtest_logreport,
    pytest_runtest_makereport,
    pytest_terminal_summary,
)

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each of several processes
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
SHIPPED_PARAMS = ROOT / "tests" / "support" / "params.yaml"
"""The parameters as shipped: those at the root are the user's."""

VOCABULARY = 32
PAD, EOS = 0, 1
LETTERS = "Ġabcdefghijklmnopqrstuvwxyz"
"""What the letter tokenizer knows beside padding and end; Ġ is the space."""


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    """Two layers of random weights over 32 tokens, spread enough that its distribution is not flat."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def tiny_policy(seed: int = 0) -> PeftModel:
    """The tiny model, frozen, with a fresh LoRA adapter."""
    model = tiny_model(seed)
    freeze_for_onednn(model)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    return get_peft_model(model, register_frozen_lora(config)).eval()


def letter_tokenizer(letters: str = LETTERS) -> PreTrainedTokenizerFast:
    """A token per letter, after padding (0) and end (1)."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<end>", *letters])}
    backend = Tokenizer(BPE(vocabulary, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_model()


@pytest.fixture
def policy_model() -> PeftModel:
    return tiny_policy()


@pytest.fixture
def params_yaml(tmp_path: Path) -> Path:
    """A copy of the shipped parameters."""
    return Path(shutil.copy(SHIPPED_PARAMS, tmp_path))


EXPECTED = (
    "SequenceClassification LOAD REPORT",  # the weights that a language model has in place of a score's
    "mtime may not be reliable",  # checkpoints lie within a second here: their order is that of the steps
)


class _Raise(logging.Handler):
    """Raises what is logged, but for `EXPECTED`."""

    def emit(self, record: logging.LogRecord) -> None:
        if not any(text in record.getMessage() for text in EXPECTED):
            raise AssertionError(f"{record.name} warns: {record.getMessage()}")


@pytest.fixture(autouse=True)
def library_warnings_are_errors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What transformers, TRL, PEFT and accelerate log as a warning fails the test; the stages would hide it."""
    monkeypatch.setattr("tasks.models.loading.transformers_logging.set_verbosity_error", lambda: None)
    handler = _Raise(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("transformers", "trl", "peft", "accelerate")]
    for logger in loggers:
        logger.addHandler(handler)
    yield
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project."""
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.setenv("RLHF_ROOT", str(tmp_path))
    return tmp_path
