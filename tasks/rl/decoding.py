"""Decoding of a left-padded batch with a language model, token by token.

Prompts are computed once and their cache is shared by the samples of a prompt; the cache is written in place, and rows
are dropped from the batch once they end.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from tasks.models.loading import position_ids

__all__ = ["Decoder", "SampledTokens", "sample_tokens"]


class SampledTokens:
    """Tokens sampled so far, their mask, log-probabilities and values, each [B, max_new_tokens]."""

    def __init__(self, rows: int, width: int, pad_token_id: int, device: torch.device) -> None:
        self.tokens = torch.full((rows, width), pad_token_id, dtype=torch.long, device=device)
        self.mask = torch.zeros_like(self.tokens, dtype=torch.bool)
        self.logprobs, self.values = torch.zeros((2, rows, width), device=device)

    def write(self, step: int, decoder: Decoder, token: Tensor, logprob: Tensor) -> None:
        self.tokens[decoder.rows, step], self.mask[decoder.rows, step] = token, True
        self.logprobs[decoder.rows, step], self.values[decoder.rows, step] = logprob, decoder.value


class Decoder:
    """Rows that have not ended, with `logits` [B, V] of the next token and `value` [B] of the state before it."""

    def __init__(
        self, model: Any, value_head: nn.Module | None, ids: Tensor, mask: Tensor, samples: int, max_new_tokens: int
    ) -> None:
        self._model, self._value_head = model, value_head
        self._cache = PreallocatedCache(ids.shape[1] + max_new_tokens)
        first = slice(None, None, samples)  # each prompt is computed once
        logits, value = self._forward(ids[first], mask[first], position_ids(mask[first]))
        self._cache.repeat(samples)
        self.logits, self.value = logits.repeat_interleave(samples, 0), value.repeat_interleave(samples, 0)
        self.rows = torch.arange(len(ids), device=ids.device)
        self._attention, self._position = mask, mask.sum(1, keepdim=True)

    def feed(self, token: Tensor, unfinished: Tensor) -> None:
        """Read the sampled tokens, and keep the unfinished rows only."""
        if unfinished.numel() < self.rows.numel():
            kept = _compact_rows(unfinished, self._cache)
            self.rows, self._attention, self._position, token = (
                tensor[kept] for tensor in (self.rows, self._attention, self._position, token)
            )
        self._attention = torch.cat([self._attention, self._attention.new_ones((self.rows.numel(), 1))], dim=1)
        self.logits, self.value = self._forward(token.unsqueeze(1), self._attention, self._position)
        self._position = self._position + 1

    def _forward(self, ids: Tensor, attention: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and value after the last of these tokens; the cache grows by them."""
        out = self._model(
            input_ids=ids,
            attention_mask=attention.long(),
            position_ids=position,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            output_hidden_states=self._value_head is not None,
        )
        logits: Tensor = out.logits[:, -1].float()
        if self._value_head is None:
            return logits, logits.new_zeros(logits.shape[0])
        value: Tensor = self._value_head(out.hidden_states[-1][:, -1].float()).squeeze(-1)
        return logits, value


class PreallocatedCache(Cache):
    """Cache of `capacity` tokens per layer whose rows can be repeated and dropped."""

    def __init__(self, capacity: int) -> None:
        super().__init__(layer_class_to_replicate=cast(type[CacheLayerMixin], partial(_Layer, capacity)))

    def repeat(self, times: int) -> None:
        """Row b becomes rows b·times … b·times + times − 1."""
        for layer in cast(list[_Layer], self.layers):
            layer.buffers = [buffer.repeat_interleave(times, 0) for buffer in layer.buffers]

    def compact(self, sources: Tensor, targets: Tensor, rows: int) -> None:
        """Copy the source rows over the target rows, and keep the first `rows`."""
        for layer in cast(list[_Layer], self.layers):
            for buffer in layer.buffers:
                buffer[targets] = buffer[sources]
            layer.buffers = [buffer[:rows] for buffer in layer.buffers]


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity, self.length = capacity, 0
        self.buffers: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        both = (key_states, value_states)
        self.buffers = [states.new_empty((*states.shape[:2], self.capacity, states.shape[3])) for states in both]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : self.length] = states
        keys, values = (buffer[:, :, : self.length] for buffer in self.buffers)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity


def _compact_rows(unfinished: Tensor, cache: PreallocatedCache) -> Tensor:
    """Move rows from the end into the slots of ended rows; return the order of the remaining rows."""
    rows = unfinished.numel()
    order = torch.arange(rows, device=unfinished.device)
    is_kept = torch.zeros(int(unfinished[-1]) + 1, dtype=torch.bool, device=unfinished.device)
    is_kept[unfinished] = True
    gaps = (~is_kept[:rows]).nonzero().squeeze(1)
    order[gaps] = unfinished[rows - gaps.numel() :]
    cache.compact(order[gaps], gaps, rows)
    return order


def sample_tokens(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse-transform sampling: token and log-probability for one uniform number per row."""
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    cumulative = logprobs.exp().cumsum(-1)
    threshold = (uniform.unsqueeze(1) * cumulative[:, -1:]).to(cumulative.dtype)
    token = torch.searchsorted(cumulative, threshold, right=True).clamp_max(logits.shape[-1] - 1)
    return token.squeeze(1), logprobs.gather(1, token).squeeze(1)
