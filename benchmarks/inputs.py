"""Shared inputs of the benchmarks: model, LoRA configuration, prompts and lengths."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

__all__ = [
    "MODEL", "PROMPT_TOKENS", "RESPONSE_TOKENS", "ROOT", "check_model", "load_tokenizer", "lora_config", "prompts",
    "repetitions",
]  # fmt: skip

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "artifacts" / "base_model" / "model"
PROMPT_TOKENS, RESPONSE_TOKENS, RANK = 32, 32, 16
NEVER_SAMPLED = "<gh_stars>"


def lora_config() -> Any:
    """LoRA configuration for every linear layer."""
    from peft import LoraConfig, TaskType

    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)


def load_tokenizer() -> Any:
    """The model's tokenizer, with an end token that is never sampled: no response ends early."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.eos_token = NEVER_SAMPLED
    return tokenizer


def prompts(count: int) -> list[list[int]]:
    """Make prompts of token ids, different in each row."""
    return [[1000 + 37 * row + place for place in range(PROMPT_TOKENS)] for row in range(count)]


def repetitions(description: str | None) -> int:
    """The command line's `--repetitions`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repetitions", type=int, default=3)
    return int(parser.parse_args().repetitions)


def check_model() -> None:
    """Exit with instructions if the model is missing."""
    if not MODEL.is_dir():
        sys.exit(f"{MODEL} does not exist: `rlhf run base_model` fetches the model")
