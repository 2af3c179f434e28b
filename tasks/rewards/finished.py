"""Pretrained reward models: fetched into `adapter/scorer/`, and loaded from there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tasks.core.errors import ModelError
from tasks.core.linear import freeze_for_onednn
from tasks.core.models import ADAPTER_DIR, device, dtype
from tasks.rewards.scorers import PretrainedScorer

__all__ = ["CARD", "PRETRAINED_DIR", "Formatter", "load_pretrained_scorer"]

PRETRAINED_DIR = f"{ADAPTER_DIR}/scorer"
CARD = "card.json"

Formatter = Callable[[str, str], str]
"""(prompt, response) → the text that the model reads."""


def load_pretrained_scorer(reward_model: Path) -> tuple[PretrainedScorer, Formatter]:
    """Load the scorer, frozen and in evaluation mode, and the formatter of its texts.

    Raises:
        ModelError: the folder is incomplete.
    """
    folder = reward_model / PRETRAINED_DIR
    if not (folder / CARD).is_file():
        raise ModelError(f"{folder}: no {CARD}; run the stage reward_model")
    card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype()).to(device()).eval()
    freeze_for_onednn(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scorer = PretrainedScorer(model, tokenizer, max_length=card["max_length"], add_special_tokens=not card["chat"])
    return scorer, _chat_formatter(tokenizer) if card["chat"] else _template_formatter(card["template"])


def _template_formatter(template: str) -> Formatter:
    """Formatter that fills the template; braces in prompt and response stay as they are."""

    def formatter(prompt: str, response: str) -> str:
        values = {"prompt": prompt, "response": response}
        return re.sub(r"\{(prompt|response)\}", lambda found: values[found[1]], template)

    return formatter


def _chat_formatter(tokenizer: Any) -> Formatter:
    def formatter(prompt: str, response: str) -> str:
        turns = [{"role": "user", "content": prompt.strip()}, {"role": "assistant", "content": response.strip()}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False))

    return formatter
