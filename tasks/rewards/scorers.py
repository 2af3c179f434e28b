"""Batched scoring of texts by sequence classifiers, trained here or fetched into `adapter/scorer/`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.tokenization_utils_base import LARGE_INTEGER

from tasks.config.base import CHAT
from tasks.core.errors import ModelError, SourceError
from tasks.core.paths import project_root
from tasks.core.rows import write_json
from tasks.models.encoding import check_context, context_length, cut_prompt, encode_prompt, encode_response, start_ids
from tasks.models.fetch import READERS, check_parts, folder_origin, hub_folder, load_folder, save_model, set_padding
from tasks.models.loading import ADAPTER_DIR, device, dtype, pad_ids, position_ids
from tasks.models.onednn_linear import freeze_for_onednn

if TYPE_CHECKING:
    from tasks.config.training import BaseModelParams, PretrainedRewardParams

__all__ = [
    "BACKBONE", "PRETRAINED_DIR", "PromptResponse", "TextScorer", "fetch_backbone", "fetch_pretrained_scorer",
    "load_pretrained_scorer",
]  # fmt: skip

BACKBONE = f"{ADAPTER_DIR}/backbone"
PRETRAINED_DIR = f"{ADAPTER_DIR}/scorer"
CARD = "card.json"

PromptResponse = tuple[str, str]
"""A prompt, empty where the text is whole, and a response."""

Formatter = Callable[[str, str], str]
"""(prompt, response) → the text that a model reads."""


class TextScorer:
    """Scores samples by the linear head at each one's end token.

    `adapter` is the one that is switched on, where the model has several.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 32, adapter: str | None = None) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._batch_size, self._adapter = batch_size, adapter

    def __call__(self, samples: Sequence[PromptResponse]) -> Tensor:
        """Raw scores, [N] float32 on the CPU; [N, K] of a model with K heads."""
        return self.scores_and_states(samples)[0]

    @torch.no_grad()
    def scores_and_states(self, samples: Sequence[PromptResponse]) -> tuple[Tensor, Tensor]:
        """Raw scores [N] or [N, K], and the head's input states [N, d], float32 on the CPU; reads equal samples once.

        What is longer than the model's context loses the first tokens of its prompt, then the last of its response.
        """
        self._model.eval()
        if self._adapter is not None:
            self._model.set_adapter(self._adapter, inference_mode=True)
        unique = {sample: self._encode(*sample) for sample in samples}
        ordered = sorted(unique, key=lambda sample: (len(unique[sample]), add(*sample)))
        batches = (ordered[start : start + self._batch_size] for start in range(0, len(ordered), self._batch_size))
        outputs = [self._forward([unique[sample] for sample in batch]) for batch in batches]
        row_of = {sample: row for row, sample in enumerate(ordered)}
        rows = [row_of[sample] for sample in samples]
        scores, states = (torch.cat(parts)[rows] for parts in zip(*outputs, strict=True))
        return scores, states

    def response_lengths(self, samples: Sequence[PromptResponse]) -> Tensor:
        """Number of tokens of each response, the end token included; [N] float32."""
        return torch.tensor([float(len(encode_response(self._tokenizer, response))) for _, response in samples])

    def text_lengths(self, samples: Sequence[PromptResponse]) -> Tensor:
        """Number of tokens of each prompt and response, without the end token; [N] float32."""
        prompts = torch.tensor([float(len(encode_prompt(self._tokenizer, prompt))) for prompt, _ in samples])
        return prompts + self.response_lengths(samples) - 1

    def _encode(self, prompt: str, response: str) -> list[int]:
        prompt_ids, response_ids = encode_prompt(self._tokenizer, prompt), encode_response(self._tokenizer, response)
        context = context_length(self._model.config)
        if context is not None and len(prompt_ids) + len(response_ids) > context:
            response_ids = [*response_ids[:-1][: context - 1], response_ids[-1]]
        room = len(prompt_ids) if context is None else context - len(response_ids)
        return cut_prompt(prompt_ids, room, len(start_ids(self._tokenizer))) + response_ids

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
        super().__init__(model, tokenizer, batch_size=batch_size)
        self._max_length, self._formatter = max_length, formatter
        self._padding, self._chat, self._head = padding or 0, chat, _last_layer(model)

    def format(self, prompt: str, response: str) -> str:
        """The text as the model reads it."""
        return self._formatter(prompt, response)

    def response_lengths(self, samples: Sequence[PromptResponse]) -> Tensor:
        """Number of tokens of each response, with the template's own, which are the same for all; [N] float32."""
        lengths = [len(self._encode(*sample)) - len(self._tokenise(sample[0])) for sample in samples]
        return torch.tensor(lengths).float() + len(self._tokenise(""))

    def text_lengths(self, samples: Sequence[PromptResponse]) -> Tensor:
        """Number of tokens of each text before truncation; [N] float32."""
        return torch.tensor([float(len(self._tokenizer(self.format(*sample)).input_ids)) for sample in samples])

    def _encode(self, prompt: str, response: str) -> list[int]:
        return self._tokenise(self.format(prompt, response))

    def _tokenise(self, text: str) -> list[int]:
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
    options = _head_options(card["head"])  # transformers saves the names that it has read
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype(), **options).to(device()).eval()
    freeze_for_onednn(model)
    settings = {name: card[name] for name in ("max_length", "template", "chat")}
    return PretrainedScorer(model, AutoTokenizer.from_pretrained(folder), **settings)


def _head_options(name: str | None) -> dict[str, Any]:
    """Options of `from_pretrained` by which the weights of this name become the classifier's only output."""
    return {"key_mapping": {rf"^{re.escape(name)}\.": "score."}, "num_labels": 1} if name else {}


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
        check_parts(model.half(), tokenizer, params.id or params.kind)
    except (ModelError, SourceError) as error:
        raise type(error)(f"reward_model.backbone, whose keys are those of base_model: {error}") from error
    save_model(model, tokenizer, folder / "model")
    write_json(folder / CARD, {"kind": params.kind, **origin, "licence": params.licence})


def fetch_pretrained_scorer(
    params: PretrainedRewardParams, max_length: int | Literal["auto"], reward_model: Path
) -> None:
    """Copy a pretrained reward model into `adapter/scorer/`, in its own precision; `auto` is all that it can read.

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
    options = {"dtype": "auto", **_head_options(params.head)}
    model, tokenizer = load_folder(folder, what, kind, key="reward_model.pretrained.id", **options)
    outputs, chat = model.config.num_labels, params.template == CHAT
    if outputs not in (1, 2):
        raise ModelError(f"{what} has {outputs} outputs; reward_model.pretrained takes one score, or two classes")
    if chat and tokenizer.chat_template is None:
        raise ModelError(f"{what} has no chat template; write reward_model.pretrained.template out")
    context = _usable_context(model)
    auto = min(int(tokenizer.model_max_length), context or LARGE_INTEGER)
    limit = auto if max_length == "auto" else max_length
    if limit >= LARGE_INTEGER:  # a tokenizer without a limit states a number beyond it
        raise ModelError(f"{what} does not state how many tokens it can read: set reward_model.max_length")
    check_context(context, limit, f"{what}: lower reward_model.max_length")
    save_model(model, tokenizer, reward_model / PRETRAINED_DIR)
    scorer_card = {"outputs": outputs, "head": params.head, "chat": chat, "template": params.template}
    write_json(reward_model / PRETRAINED_DIR / CARD, {**origin, **scorer_card, "max_length": limit})


def _usable_context(model: Any) -> int | None:
    """See `context_length`; RoBERTa and its kin count from the position after the padding's, as their table says."""
    tables = [part for name, part in model.named_modules() if name.endswith("position_embeddings")]
    unused = [1 + part.padding_idx for part in tables if getattr(part, "padding_idx", None) is not None]
    context = context_length(model.config)
    return None if context is None else context - max(unused, default=0)
