"""Fetching of pretrained reward models and backbones into the stage's folder, which DVC hashes.

On another machine neither the hub nor the local folder is needed; the card beside each copy records where it is
from, at which commit or with which checksum.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForSequenceClassification

from tasks.core.errors import ModelError, SourceError
from tasks.core.files import write_json
from tasks.core.paths import project_root
from tasks.core.sections.base_model import BaseModelParams
from tasks.core.sections.reward_model import CHAT, PretrainedRewardParams
from tasks.data.model_folder import save_model, set_padding
from tasks.data.model_readers import READERS, folder_origin, hub_folder, load_folder
from tasks.rewards.finished import CARD, PRETRAINED_DIR
from tasks.rewards.learned import BACKBONE

__all__ = ["fetch_backbone", "fetch_pretrained_scorer"]


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
        folder, origin = hub_folder(params.id, params.revision, alternative="make reward_model.scorer.id a local folder")
    what, kind = f"scorer {params.id}", AutoModelForSequenceClassification
    model, tokenizer = load_folder(folder, what, kind, key="reward_model.scorer.id", dtype="auto")
    outputs, chat = model.config.num_labels, params.template == CHAT
    if outputs not in (1, 2):
        raise ModelError(f"{what} has {outputs} outputs; reward_model.scorer takes one score, or two classes")
    if chat and tokenizer.chat_template is None:
        raise ModelError(f"{what} has no chat template; write reward_model.scorer.template out")
    save_model(model, tokenizer, reward_model / PRETRAINED_DIR)
    scorer_card = {"outputs": outputs, "chat": chat, "template": params.template, "max_length": max_length}
    write_json(reward_model / PRETRAINED_DIR / CARD, {**origin, **scorer_card})
