"""Sampling of responses: a plain decode loop over a left-padded batch.

The loop differs from a general `generate` in what it leaves out: no top-k or top-p (what is sampled must be what is
trained), prompts computed once and their cache shared by the samples of a prompt, the cache written in place, rows
dropped from the batch once they end, and the log-probabilities of the sampled tokens kept from the very logits they
were sampled from. On a CPU the weights are rearranged for small products, adapters added
(`tasks.models.onednn_linear`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from tasks.core import distributed
from tasks.models.batching import pad_ids, position_ids
from tasks.models.onednn_linear import merged_weights

__all__ = [
    "PreallocatedCache",
    "Rollout",
    "derive_generator",
    "generate",
]


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


@dataclass(frozen=True)
class Rollout:
    """Responses to a batch of prompts; row b·samples_per_prompt + g is sample g of prompt b.

    Attributes:
        prompts: [B, P] token ids, padded on the left.
        prompt_mask: [B, P] true where a prompt token stands.
        responses: [B, T] token ids, padded on the right after the end token.
        response_mask: [B, T] true up to and including the end token.
        logprobs: [B, T] log π(token) at the sampling temperature, 0 where masked.
        values: [B, T] V(state in which the token was chosen), 0 where masked and without a value head.
        has_eos: [B] true where the response has its end token.
    """

    prompts: Tensor
    prompt_mask: Tensor
    responses: Tensor
    response_mask: Tensor
    logprobs: Tensor
    values: Tensor
    has_eos: Tensor

    def gather(self, pad_token_id: int) -> Rollout:
        """Gather the rollouts of all ranks, in order of rank."""
        return Rollout(
            prompts=distributed.all_gather(self.prompts, pad=pad_token_id, left=True),
            prompt_mask=distributed.all_gather(self.prompt_mask, left=True),
            responses=distributed.all_gather(self.responses, pad=pad_token_id),
            response_mask=distributed.all_gather(self.response_mask),
            logprobs=distributed.all_gather(self.logprobs),
            values=distributed.all_gather(self.values),
            has_eos=distributed.all_gather(self.has_eos),
        )

    def response_ids(self) -> list[list[int]]:
        """The responses without padding and without their end token."""
        lengths = self.response_mask.sum(1) - self.has_eos.long()
        return [row[:n].tolist() for row, n in zip(self.responses, lengths.tolist(), strict=True)]

    def texts(self, decode: Callable[[Sequence[int]], str]) -> list[str]:
        """Decode the responses, as the reward reads them."""
        return [decode(ids) for ids in self.response_ids()]

    def display_texts(self, responses: list[str]) -> list[str]:
        """The responses, for people to read."""
        return responses

    @property
    def external_rewards(self) -> Mapping[str, Any]:
        """Reward components that the rollout already holds; see `CompositeReward`."""
        return {}


def derive_generator(*parts: int) -> torch.Generator:
    """Derive a generator from all parts, by a polynomial hash below 2^63."""
    value = 0
    for part in parts:
        value = (value * 1_000_003 + part + 1) % (2**63 - 25)
    return torch.Generator().manual_seed(value)


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    eos_token_id: int,
    pad_token_id: int,
    generator: torch.Generator,
    samples_per_prompt: int = 1,
    value_head: nn.Module | None = None,
    rank: int = 0,
    world_size: int = 1,
    active_rows: Sequence[int] | None = None,
    total_rows: int | None = None,
) -> Rollout:
    """Sample responses from softmax(logits / temperature).

    Args:
        model: a causal language model, with or without adapters.
        prompts: token ids of each prompt, none of them empty.
        generator: on the CPU; one uniform number per row and step is drawn from it, for ended rows too, so that a
            row's sample does not depend on when the other rows end.
        value_head: maps the last hidden state [B, d] to values [B, 1]; it reads the states that decoding computes
            anyway, so that values cost no forward pass of their own.
        rank, world_size: these prompts are this one, from 0, of so many equal parts of a batch; their responses are
            those that they would get in the whole.
        active_rows, total_rows: these prompts are those rows, one sample each, of a part that has so many; the other
            rows take no part in this call, and their numbers are drawn all the same.

    Returns:
        The rollout, on the model's device; T is max_new_tokens, or less when every response ended earlier.
    """
    device = next(model.parameters()).device
    ids, mask = (tensor.to(device) for tensor in pad_ids(prompts, pad_token_id, side="left"))
    cache = PreallocatedCache(ids.shape[1] + max_new_tokens)
    batch = ids.shape[0] * samples_per_prompt
    responses = torch.full((batch, max_new_tokens), pad_token_id, dtype=torch.long, device=device)
    response_mask = torch.zeros_like(responses, dtype=torch.bool)
    logprobs, values = torch.zeros((2, *responses.shape), device=device)
    active = torch.arange(batch, device=device)
    rows_per_rank = batch if total_rows is None else total_rows
    rng_rows = rank * rows_per_rank + (torch.arange(batch) if active_rows is None else torch.tensor(active_rows))
    with merged_weights(model):
        logits, value = _step(model, ids, mask, position_ids(mask), cache, value_head)
        cache.repeat(samples_per_prompt)
        ids, mask, logits, value = (x.repeat_interleave(samples_per_prompt, 0) for x in (ids, mask, logits, value))
        attention, position = mask, mask.sum(1, keepdim=True)
        for step in range(max_new_tokens):
            uniform = torch.rand(world_size * rows_per_rank, generator=generator)[rng_rows].to(device)[active]
            token, logprob = _sample(logits, temperature, uniform)
            responses[active, step], response_mask[active, step] = token, True
            logprobs[active, step], values[active, step] = logprob, value
            unfinished = (token != eos_token_id).nonzero().squeeze(1)
            if unfinished.numel() == 0 or step + 1 == max_new_tokens:
                break
            if unfinished.numel() < active.numel():
                unfinished = _compact_rows(unfinished, cache)
                active, attention, position, token = (
                    active[unfinished],
                    attention[unfinished],
                    position[unfinished],
                    token[unfinished],
                )
            attention = torch.cat([attention, attention.new_ones((active.numel(), 1))], dim=1)
            logits, value = _step(model, token.unsqueeze(1), attention, position, cache, value_head)
            position = position + 1
    has_eos = ((responses == eos_token_id) & response_mask).any(1)
    columns = slice(0, int(response_mask.sum(1).max()))
    return Rollout(
        prompts=ids,
        prompt_mask=mask,
        responses=responses[:, columns],
        response_mask=response_mask[:, columns],
        logprobs=logprobs[:, columns],
        values=values[:, columns],
        has_eos=has_eos,
    )


def _step(
    model: Any, ids: Tensor, attention: Tensor, position: Tensor, cache: PreallocatedCache, value_head: nn.Module | None
) -> tuple[Tensor, Tensor]:
    """Logits [B, V] of the token that follows each row, and the value [B] of its state; the cache grows by the ids."""
    out = model(
        input_ids=ids,
        attention_mask=attention.long(),
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        output_hidden_states=value_head is not None,
    )
    logits: Tensor = out.logits[:, -1].float()
    if value_head is None:
        return logits, logits.new_zeros(logits.shape[0])
    value: Tensor = value_head(out.hidden_states[-1][:, -1].float()).squeeze(-1)
    return logits, value


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


def _sample(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse-transform sampling: token and log-probability for one uniform number per row."""
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    cumulative = logprobs.exp().cumsum(-1)
    threshold = (uniform.unsqueeze(1) * cumulative[:, -1:]).to(cumulative.dtype)
    token = torch.searchsorted(cumulative, threshold, right=True).clamp_max(logits.shape[-1] - 1)
    return token.squeeze(1), logprobs.gather(1, token).squeeze(1)
