"""Batched scoring of texts by sequence classifiers: raw scores and the head's input states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from tasks.core.errors import ModelError
from tasks.models.loading import device, pad_ids, position_ids

__all__ = ["Formatter", "PretrainedScorer", "PromptResponse", "TextScorer", "encode"]

PromptResponse = tuple[str, str]
"""A prompt, empty where the text is whole, and a response."""

Formatter = Callable[[str, str], str]
"""(prompt, response) → the text that a model reads."""


def encode(tokenizer: Any, text: str, max_length: int) -> list[int]:
    """Tokenise a text, truncate it to max_length and append the end token, as every trained scorer reads it."""
    ids: list[int] = tokenizer(text, truncation=True, max_length=max_length - 1).input_ids
    return [*ids, tokenizer.eos_token_id]


class TextScorer:
    """Scores texts by the linear head at each text's end token."""

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
        """Pair a model with its tokenizer; `adapter` is the one that is switched on, where the model has several."""
        self._model, self._tokenizer = model, tokenizer
        self._max_length, self._batch_size = max_length, batch_size
        self._adapter, self._formatter = adapter, formatter

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Raw scores, [len(texts)] float32 on the CPU; [len(texts), K] of a model with K heads."""
        return self.scores_and_states(texts)[0]

    @torch.no_grad()
    def scores_and_states(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Raw scores [N], or [N, K], and the head's input states [N, d], float32 on the CPU.

        Equal texts are read once, in batches of like length.
        """
        self._model.eval()
        if self._adapter is not None:
            self._model.set_adapter(self._adapter, inference_mode=True)
        unique = {text: self._encode(text) for text in texts}
        ordered = sorted(unique, key=lambda text: (len(unique[text]), text))
        outputs = [
            self._forward([unique[text] for text in ordered[start : start + self._batch_size]])
            for start in range(0, len(ordered), self._batch_size)
        ]
        row_of = {text: row for row, text in enumerate(ordered)}
        rows = [row_of[text] for text in texts]
        scores, states = (torch.cat(parts)[rows] for parts in zip(*outputs, strict=True))
        return scores, states

    def format(self, samples: Sequence[PromptResponse]) -> list[str]:
        """The text of each sample as the model reads it."""
        return [self._formatter(prompt, response) for prompt, response in samples]

    def lengths(self, texts: Sequence[str], *, untruncated: bool = False) -> Tensor:
        """Number of tokens of each text after truncation, or untruncated and without the end token; [N] float32."""
        if untruncated:
            return torch.tensor([float(len(self._tokenizer(text).input_ids)) for text in texts])
        return torch.tensor([float(len(self._encode(text))) for text in texts])

    def _encode(self, text: str) -> list[int]:
        return encode(self._tokenizer, text, self._max_length)

    def _forward(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        ids, mask = pad_ids(rows, self._tokenizer.pad_token_id, side="right")
        model_device = device()
        with _capture_inputs(self._model.score) as states:
            logits: Tensor = self._model(
                input_ids=ids.to(model_device),
                attention_mask=mask.long().to(model_device),
                position_ids=position_ids(mask).to(model_device),
            ).logits
        return logits.squeeze(-1).float().cpu(), _last_token_states(states[0], rows).float().cpu()


class PretrainedScorer(TextScorer):
    """A pretrained sequence classifier with its own tokenisation, pooling and head."""

    def __init__(
        self, model: Any, tokenizer: Any, *, max_length: int, add_special_tokens: bool, formatter: Formatter
    ) -> None:
        """Pair a model with its tokenizer.

        Args:
            model: of one output, or of two classes, whose log-odds for the second are then the score.
            add_special_tokens: whether the tokenizer adds its special tokens; a chat template has done so already.

        Raises:
            ModelError: it has no linear layer that makes its outputs.
        """
        padding = model.config.get_text_config().pad_token_id
        # Such a model takes the last token of a batch as the end of the text, so only single ones are read rightly.
        batch_size = 1 if padding is None else 32
        super().__init__(model, tokenizer, max_length=max_length, batch_size=batch_size, formatter=formatter)
        self._padding = padding or 0
        self._add_special_tokens = add_special_tokens
        self._head = _last_layer(model)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(
            text, truncation=True, max_length=self._max_length, add_special_tokens=self._add_special_tokens
        ).input_ids
        return ids

    def _forward(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        ids, mask = pad_ids(rows, self._padding, side="right")
        with _capture_inputs(self._head) as states:
            logits: Tensor = self._model(input_ids=ids.to(device()), attention_mask=mask.long().to(device())).logits
        score = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
        end_states = states[0] if states[0].dim() == 2 else _last_token_states(states[0], rows)
        return score.float().cpu(), end_states.float().cpu()


def _last_layer(model: Any) -> nn.Module:
    """Output layer, whatever its name: the last linear layer with as many outputs."""
    outputs = model.config.num_labels
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == outputs]
    if not layers:
        raise ModelError(f"{type(model).__name__} has no linear layer with {outputs} outputs: choose another scorer")
    return layers[-1]


def _last_token_states(states: Tensor, rows: list[list[int]]) -> Tensor:
    """States at each text's last token, [B, T, d] → [B, d]."""
    return states[range(len(rows)), [len(row) - 1 for row in rows]]


@contextmanager
def _capture_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Capture the inputs of the module inside the context."""
    captured: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    try:
        yield captured
    finally:
        handle.remove()
