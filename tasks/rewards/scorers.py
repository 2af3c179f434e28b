"""Batched scoring of texts by sequence classifiers, trained here or fetched into `adapter/scorer/`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tasks.config.base import CHAT
from tasks.core.errors import ModelError, SourceError
from tasks.core.paths import project_root
from tasks.core.rows import write_json
from tasks.models.fetch import READERS, folder_origin, hub_folder, load_folder, save_model, set_padding
from tasks.models.loading import ADAPTER_DIR, device, dtype, pad_ids, position_ids
from tasks.models.onednn_linear import freeze_for_onednn

if TYPE_CHECKING:
    from tasks.config.training import BaseModelParams, PretrainedRewardParams

__all__ = [
    "BACKBONE",
    "PRETRAINED_DIR",
    "PromptResponse",
    "TextScorer",
    "encode",
    "fetch_backbone",
    "fetch_pretrained_scorer",
    "load_pretrained_scorer",
]

BACKBONE = f"{ADAPTER_DIR}/backbone"
PRETRAINED_DIR = f"{ADAPTER_DIR}/scorer"
CARD = "card.json"

PromptResponse = tuple[str, str]
"""A prompt, empty where the text is whole, and a response."""

Formatter = Callable[[str, str], str]
"""(prompt, response) → the text that a model reads."""


def encode(tokenizer: Any, text: str, max_length: int) -> list[int]:
    """Tokenise a text, truncate it to max_length and append the end token, as every trained scorer reads it."""
    return [*tokenizer(text, truncation=True, max_length=max_length - 1).input_ids, tokenizer.eos_token_id]


class TextScorer:
    """Scores texts by the linear head at each text's end token.

    `adapter` is the one that is switched on, where the model has several.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_length: int,
        batch_size: int = 32,
        adapter: str | None = None,
        formatter: Formatter = add,
    ) -> None:
        self._model, self._tokenizer, self._max_length = model, tokenizer, max_length
        self._batch_size, self._adapter, self._formatter = batch_size, adapter, formatter

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Raw scores, [len(texts)] float32 on the CPU; [len(texts), K] of a model with K heads."""
        return self.scores_and_states(texts)[0]

    @torch.no_grad()
    def scores_and_states(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Raw scores [N] or [N, K], and the head's input states [N, d], float32 on the CPU; reads equal texts once."""
        self._model.eval()
        if self._adapter is not None:
            self._model.set_adapter(self._adapter, inference_mode=True)
        unique = {text: self._encode(text) for text in texts}
        ordered = sorted(unique, key=lambda text: (len(unique[text]), text))
        batches = (ordered[start : start + self._batch_size] for start in range(0, len(ordered), self._batch_size))
        outputs = [self._forward([unique[text] for text in batch]) for batch in batches]
        row_of = {text: row for row, text in enumerate(ordered)}
        rows = [row_of[text] for text in texts]
        scores, states = (torch.cat(parts)[rows] for parts in zip(*outputs, strict=True))
        return scores, states

    def format(self, samples: Sequence[PromptResponse]) -> list[str]:
        """The text of each sample as the model reads it."""
        return [self._formatter(prompt, response) for prompt, response in samples]

    def lengths(self, texts: Sequence[str], *, untruncated: bool = False) -> Tensor:
        """Number of tokens of each text after truncation, or untruncated and without the end token; [N] float32."""
        rows = [self._tokenizer(text).input_ids if untruncated else self._encode(text) for text in texts]
        return torch.tensor([float(len(row)) for row in rows])

    def _encode(self, text: str) -> list[int]:
        return encode(self._tokenizer, text, self._max_length)

    def _forward(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Scores [B], or [B, K], and states [B, d] of tokenised texts."""
        ids, mask = pad_ids(rows, self._tokenizer.pad_token_id, side="right")
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": position_ids(mask)}
        logits, states = _logits_and_states(self._model, self._model.score, inputs)
        return logits.squeeze(-1).float().cpu(), states.float().cpu()


class PretrainedScorer(TextScorer):
    """A pretrained sequence classifier with its own tokenisation, pooling and head.

    Of a model with two classes, the score is the log-odds for the second.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_length: int, template: str, chat: bool) -> None:
        """Pair a model with its tokenizer; where it has a chat template, `template` does not count.

        Raises:
            ModelError: the model has no linear layer that makes its outputs.
        """
        padding = model.config.get_text_config().pad_token_id
        # Without one, the model takes the last token of a batch as the end of the text: right for single ones alone.
        batch_size = 1 if padding is None else 32
        formatter = partial(_apply_chat, tokenizer) if chat else partial(_fill_template, template)
        super().__init__(model, tokenizer, max_length=max_length, batch_size=batch_size, formatter=formatter)
        self._padding, self._chat, self._head = padding or 0, chat, _last_layer(model)

    def _encode(self, text: str) -> list[int]:
        options = {"truncation": True, "max_length": self._max_length, "add_special_tokens": not self._chat}
        return list(self._tokenizer(text, **options).input_ids)

    def _forward(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        ids, mask = pad_ids(rows, self._padding, side="right")
        logits, states = _logits_and_states(self._model, self._head, {"input_ids": ids, "attention_mask": mask.long()})
        score = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
        return score.float().cpu(), states.float().cpu()


def _last_layer(model: Any) -> nn.Module:
    """Output layer, whatever its name: the last linear layer with as many outputs."""
    outputs = model.config.num_labels
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == outputs]
    if not layers:
        raise ModelError(f"{type(model).__name__} has no linear layer with {outputs} outputs: choose another scorer")
    return layers[-1]


def _logits_and_states(model: Any, head: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits [B, K], and what the head reads, [B, d]: of each position, at the text's last token."""
    captured: list[Tensor] = []
    with head.register_forward_pre_hook(lambda _, states: captured.append(states[0])):
        logits: Tensor = model(**{name: values.to(device()) for name, values in inputs.items()}).logits
    states = captured[0]
    if states.dim() == 3:
        states = states[range(len(states)), (inputs["attention_mask"].sum(1) - 1).tolist()]
    return logits, states


def load_pretrained_scorer(reward_model: Path) -> PretrainedScorer:
    """Load the scorer, frozen and in evaluation mode.

    Raises:
        ModelError: the folder is incomplete.
    """
    folder = reward_model / PRETRAINED_DIR
    if not (folder / CARD).is_file():
        raise ModelError(f"{folder}: no {CARD}; run the stage reward_model")
    card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype()).to(device()).eval()
    freeze_for_onednn(model)
    settings = {name: card[name] for name in ("max_length", "template", "chat")}
    return PretrainedScorer(model, AutoTokenizer.from_pretrained(folder), **settings)


def _fill_template(template: str, prompt: str, response: str) -> str:
    """Fill the template; braces in prompt and response stay as they are."""
    values = {"prompt": prompt, "response": response}
    return re.sub(r"\{(prompt|response)\}", lambda found: values[found[1]], template)


def _apply_chat(tokenizer: Any, prompt: str, response: str) -> str:
    turns = [{"role": "user", "content": prompt.strip()}, {"role": "assistant", "content": response.strip()}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


def fetch_backbone(params: BaseModelParams, seed: int, reward_model: Path) -> None:
    """Write a language model into `adapter/backbone/`, laid out as stage base_model does.

    Raises:
        ModelError: it is incomplete.
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
    folder = project_root() / Path(params.id).expanduser()
    if folder.is_dir():
        origin = folder_origin(folder)
    else:
        advice = "make reward_model.pretrained.id a local folder"
        folder, origin = hub_folder(params.id, params.revision, alternative=advice)
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
