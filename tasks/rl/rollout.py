"""Rollouts: the `Sampler` interface, and the local sampler, a plain decode loop over a left-padded batch.

The loop differs from a general `generate` in what it leaves out: no top-k or top-p (what is sampled must be what is
trained), prompts computed once and their cache shared by the samples of a prompt, the cache written in place, rows
dropped from the batch once they end, and the log-probabilities of the sampled tokens kept from the very logits they
were sampled from. On a CPU the weights are rearranged for small products, adapters added
(`tasks.models.onednn_linear`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from tasks.config.training import GenerationParams
from tasks.core import distributed
from tasks.core.errors import ConfigError
from tasks.core.rows import Prompt
from tasks.models.batching import pad_left, position_ids
from tasks.models.loading import init_process, load_policy, load_reference, load_tokenizer
from tasks.models.onednn_linear import merged_weights

__all__ = [
    "BatchRows",
    "LocalSampler",
    "PreallocatedCache",
    "Rollout",
    "Sampler",
    "derive_generator",
    "extend_generator",
    "load_sampler",
    "sample_in_batches",
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
        has_eos: [B] true where the response has its end token.
        prompt_texts: the B prompts.
        texts: the B responses without their end tokens, as the reward reads them.
        pad_token_id: fills `prompts` and `responses`.
        values: [B, T] V(state in which the token was chosen), 0 where masked; only from a sampler with a value head.
    """

    prompts: Tensor
    prompt_mask: Tensor
    responses: Tensor
    response_mask: Tensor
    logprobs: Tensor
    has_eos: Tensor
    prompt_texts: list[str]
    texts: list[str]
    pad_token_id: int
    values: Tensor | None = None

    def gather(self) -> Rollout:
        """Gather the rollouts of all ranks, in order of rank."""
        return Rollout(
            prompts=distributed.all_gather(self.prompts, pad=self.pad_token_id, left=True),
            prompt_mask=distributed.all_gather(self.prompt_mask, left=True),
            responses=distributed.all_gather(self.responses, pad=self.pad_token_id),
            response_mask=distributed.all_gather(self.response_mask),
            logprobs=distributed.all_gather(self.logprobs),
            has_eos=distributed.all_gather(self.has_eos),
            prompt_texts=distributed.all_gather_texts(self.prompt_texts),
            texts=distributed.all_gather_texts(self.texts),
            pad_token_id=self.pad_token_id,
            values=None if self.values is None else distributed.all_gather(self.values),
        )

    @property
    def transcripts(self) -> list[str]:
        """All text after each prompt, for people to read."""
        return self.texts

    @property
    def external_rewards(self) -> Mapping[str, Any]:
        """Reward components that the rollout already holds; see `CompositeReward`."""
        return {}


@dataclass(frozen=True)
class BatchRows:
    """Position of responses in a larger batch that is sampled in parts, by several ranks or turn by turn.

    A response is sampled from its row's random numbers, so it is the same in whichever part.
    """

    rows: Sequence[int]
    total: int

    @classmethod
    def of_this_rank(cls, count: int) -> BatchRows:
        """Rows of this rank, where each rank samples `count` responses."""
        start = distributed.rank() * count
        return cls(range(start, start + count), distributed.world_size() * count)

    def select(self, positions: Sequence[int]) -> BatchRows:
        """The rows at these positions, of the same batch."""
        return BatchRows([self.rows[position] for position in positions], self.total)


class Sampler(Protocol):
    """Source of responses: a model in this process, or an engine elsewhere that takes and returns token ids."""

    tokenizer: Any

    def sample(
        self,
        prompts: Sequence[Prompt] | Sequence[str] | Sequence[Sequence[int]],
        generator: torch.Generator,
        *,
        samples_per_prompt: int = 1,
        batch_rows: BatchRows | None = None,
    ) -> Rollout:
        """Sample responses to prompts, which are rows, texts, or token ids.

        Args:
            generator: source of all random numbers; on the CPU.
            batch_rows: position of each response in a larger batch; None: these are all responses.
        """


class LocalSampler:
    """Sampler of softmax(logits / temperature) of a model in this process."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        generation: GenerationParams,
        value_head: nn.Module | None = None,
        *,
        chat_template: bool = False,
    ) -> None:
        """Keep the model, a causal language model with or without adapters, and the settings.

        Args:
            value_head: maps the last hidden state [B, d] to values [B, 1]; it reads the states that decoding computes
                anyway, so that values cost no forward pass of their own.
            chat_template: format each prompt as a user's message, and not as the beginning of a text.

        Raises:
            ConfigError: the tokenizer has no chat template.
        """
        if chat_template and not tokenizer.chat_template:
            raise ConfigError("the model's tokenizer has no chat template: leave --chat-template out")
        self.tokenizer, self._chat_template = tokenizer, chat_template
        self._model, self._generation, self._value_head = model, generation, value_head

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt] | Sequence[str] | Sequence[Sequence[int]],
        generator: torch.Generator,
        *,
        samples_per_prompt: int = 1,
        batch_rows: BatchRows | None = None,
    ) -> Rollout:
        """Sample responses, see `Sampler.sample`; the rollout is on the model's device.

        One uniform number per row and step is drawn from the generator, for ended rows and those of other parts too, so
        that a row's sample does not depend on them. T is `max_new_tokens`, or less when every response ended earlier.

        Raises:
            ConfigError: a prompt is empty.
        """
        texts = [prompt.prompt if isinstance(prompt, Prompt) else prompt for prompt in prompts]
        token_ids = [self._tokenise(text) if isinstance(text, str) else text for text in texts]
        device, pad = next(self._model.parameters()).device, self.tokenizer.pad_token_id
        ids, mask = (tensor.to(device).repeat_interleave(samples_per_prompt, 0) for tensor in pad_left(token_ids, pad))
        rows = batch_rows or BatchRows(range(len(ids)), len(ids))
        columns = self._write(ids, mask, samples_per_prompt, generator, rows)
        width = int(columns.mask.sum(1).max())
        responses, response_mask = columns.tokens[:, :width], columns.mask[:, :width]
        has_eos = ((responses == self.tokenizer.eos_token_id) & response_mask).any(1)
        lengths = (response_mask.sum(1) - has_eos.long()).tolist()
        prompt_texts = [text if isinstance(text, str) else self._decode(text) for text in texts]
        return Rollout(
            prompts=ids,
            prompt_mask=mask,
            responses=responses,
            response_mask=response_mask,
            logprobs=columns.logprobs[:, :width],
            has_eos=has_eos,
            prompt_texts=[text for text in prompt_texts for _ in range(samples_per_prompt)],
            texts=[self._decode(row[:n].tolist()) for row, n in zip(responses, lengths, strict=True)],
            pad_token_id=pad,
            values=None if self._value_head is None else columns.values[:, :width],
        )

    def _write(self, ids: Tensor, mask: Tensor, samples: int, generator: torch.Generator, rows: BatchRows) -> _Columns:
        """Sample a token of every row that has not ended, step by step."""
        columns = _Columns(len(ids), self._generation.max_new_tokens, self.tokenizer.pad_token_id, ids.device)
        row_numbers = torch.tensor(rows.rows)
        with merged_weights(self._model):
            decoder = _Decoder(self._model, self._value_head, ids, mask, samples, self._generation.max_new_tokens)
            for step in range(self._generation.max_new_tokens):
                uniform = torch.rand(rows.total, generator=generator)[row_numbers].to(ids.device)[decoder.rows]
                token, logprob = _sample(decoder.logits, self._generation.temperature, uniform)
                columns.write(step, decoder, token, logprob)
                unfinished = (token != self.tokenizer.eos_token_id).nonzero().squeeze(1)
                if unfinished.numel() == 0 or step + 1 == self._generation.max_new_tokens:
                    break
                decoder.feed(token, unfinished)
        return columns

    def _tokenise(self, prompt: str) -> list[int]:
        text = prompt
        if self._chat_template:
            message = [{"role": "user", "content": prompt}]
            text = str(self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        ids: list[int] = self.tokenizer(text, add_special_tokens=not self._chat_template).input_ids
        if not ids:
            raise ConfigError(f"prompt {prompt!r} is empty: write at least a word")
        return ids

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


class _Columns:
    """What has been sampled so far: tokens, mask, log-probabilities and values, each [B, max_new_tokens]."""

    def __init__(self, rows: int, width: int, pad_token_id: int, device: torch.device) -> None:
        self.tokens = torch.full((rows, width), pad_token_id, dtype=torch.long, device=device)
        self.mask = torch.zeros_like(self.tokens, dtype=torch.bool)
        self.logprobs, self.values = torch.zeros((2, rows, width), device=device)

    def write(self, step: int, decoder: _Decoder, token: Tensor, logprob: Tensor) -> None:
        self.tokens[decoder.rows, step], self.mask[decoder.rows, step] = token, True
        self.logprobs[decoder.rows, step], self.values[decoder.rows, step] = logprob, decoder.value


class _Decoder:
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


def load_sampler(
    artifacts: Path, policy: str, generation: GenerationParams, *, chat_template: bool = False
) -> LocalSampler:
    """Load the sampler of a policy stage, or of the SFT model for `sft`, from folders laid out as the artifacts.

    Raises:
        ConfigError: the tokenizer has no chat template.
        ModelError: a folder is incomplete.
    """
    init_process()
    base_model, sft = artifacts / "base_model", artifacts / "sft"
    is_reference = policy == sft.name
    model = load_reference(base_model, sft) if is_reference else load_policy(base_model, sft, artifacts / policy)
    return LocalSampler(model, load_tokenizer(base_model), generation, chat_template=chat_template)


def sample_in_batches(
    sampler: Sampler,
    prompts: Sequence[str],
    generator: torch.Generator,
    *,
    samples_per_prompt: int = 1,
    batch_size: int = 32,
) -> Iterator[Rollout]:
    """Sample responses to a batch of prompts at a time, in order."""
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        yield sampler.sample(batch, generator, samples_per_prompt=samples_per_prompt)


def derive_generator(*parts: int) -> torch.Generator:
    """Derive a generator from all parts, by a polynomial hash below 2^63."""
    seed = 0
    for part in parts:
        seed = _extend_seed(seed, part)
    return torch.Generator().manual_seed(seed)


def extend_generator(generator: torch.Generator, part: int) -> torch.Generator:
    """Derive a generator from one more part: `derive_generator(*parts, part)` from `derive_generator(*parts)`."""
    return torch.Generator().manual_seed(_extend_seed(generator.initial_seed(), part))


def _extend_seed(seed: int, part: int) -> int:
    return (seed * 1_000_003 + part + 1) % (2**63 - 25)


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
