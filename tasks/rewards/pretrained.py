"""Pretrained reward models: fetched into `adapter/scorer/`, and loaded from there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tasks.config.base import CHAT
from tasks.core.errors import ModelError, SourceError
from tasks.core.paths import project_root
from tasks.core.rows import write_json
from tasks.models.fetch import READERS, folder_origin, hub_folder, load_folder, save_model, set_padding
from tasks.models.loading import ADAPTER_DIR, device, dtype
from tasks.models.onednn_linear import freeze_for_onednn
from tasks.rewards.scorers import PretrainedScorer

if TYPE_CHECKING:
    from tasks.config.training import BaseModelParams, PretrainedRewardParams

__all__ = [
    "CARD",
    "PRETRAINED_DIR",
    "Formatter",
    "fetch_backbone",
    "fetch_pretrained_scorer",
    "load_pretrained_scorer",
]

BACKBONE = f"{ADAPTER_DIR}/backbone"
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


def fetch_backbone(params: BaseModelParams, seed: int, reward_model: Path) -> None:
    """Write a language model into `adapter/backbone/`, laid out as stage base_model does.

    Raises:
        ModelError: it or its tokenizer is incomplete.
        SourceError: it could not be fetched.
    """
    folder = reward_model / BACKBONE
    try:
        model, tokenizer, origin = READERS[params.kind](params, seed)
        set_padding(model, tokenizer, params.pad_token)
    except (ModelError, SourceError) as error:
        raise type(error)(f"reward_model.backbone, whose keys are those of base_model: {error}") from error
    save_model(model.half(), tokenizer, folder / "model")
    write_json(folder / CARD, {"kind": params.kind, **origin, "licence": params.licence})


def fetch_pretrained_scorer(params: PretrainedRewardParams, max_length: int, reward_model: Path) -> None:
    """Copy a pretrained reward model into `adapter/scorer/`, in its own precision.

    Raises:
        ModelError: it is incomplete, or gives neither one score nor two classes.
        SourceError: there is no such folder, and the hub does not give it.
    """
    local = project_root() / Path(params.id).expanduser()
    if local.is_dir():
        folder, origin = local, folder_origin(local)
    else:
        folder, origin = hub_folder(
            params.id, params.revision, alternative="make reward_model.pretrained.id a local folder"
        )
    what, kind = f"scorer {params.id}", AutoModelForSequenceClassification
    model, tokenizer = load_folder(folder, what, kind, key="reward_model.pretrained.id", dtype="auto")
    outputs, chat = model.config.num_labels, params.template == CHAT
    if outputs not in (1, 2):
        raise ModelError(f"{what} has {outputs} outputs; reward_model.pretrained takes one score, or two classes")
    if chat and tokenizer.chat_template is None:
        raise ModelError(f"{what} has no chat template; write reward_model.pretrained.template out")
    save_model(model, tokenizer, reward_model / PRETRAINED_DIR)
    scorer_card = {"outputs": outputs, "chat": chat, "template": params.template, "max_length": max_length}
    write_json(reward_model / PRETRAINED_DIR / CARD, {**origin, **scorer_card})
