"""Rollouts, and the samplers that give them: the `Sampler` interface, and the sampler of a model in this process.

Sampling is plain, without top-k or top-p: what is sampled must be what is trained. The log-probabilities of sampled
tokens are those of the very logits that they were sampled from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from tasks.core import distributed
from tasks.core.errors import ConfigError
from tasks.core.rows import Prompt
from tasks.models.encoding import check_context, context_length, decode_response, encode_chat, encode_prompt
from tasks.models.loading import init_process, load_policy, load_reference, load_tokenizer, pad_ids
from tasks.models.onednn_linear import merged_weights
from tasks.rl.decoding import Decoder, SampledTokens, sample_tokens

if TYPE_CHECKING:
    from tasks.config.training import GenerationParams

__all__ = [
    "BatchRows", "LocalSampler", "PromptBatch", "Rollout", "Sampler", "TokenBatch", "derive_generator",
    "extend_generator", "load_sampler", "sample_in_batches",
]  # fmt: skip


@dataclass(frozen=True)
class TokenBatch:
    """Prompts and responses as token ids and texts; `texts` are without end tokens, as the reward reads them."""

    prompts: Tensor  # [B, P] padded on the left
    prompt_mask: Tensor  # [B, P] true where a prompt token stands
    responses: Tensor  # [B, T] padded on the right after the end token
    response_mask: Tensor  # [B, T] true up to and including the end token
    prompt_texts: list[str]
    texts: list[str]

    def tokens_and_texts(self) -> dict[str, Any]:
        """The fields of `TokenBatch`, by name."""
        return {field.name: getattr(self, field.name) for field in fields(TokenBatch)}

    def __len__(self) -> int:
        return self.responses.shape[0]

    def select(self, rows: Tensor) -> Self:
        """The given rows, in the given order."""
        values: dict[str, Any] = dict(vars(self))
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = value[rows]
            elif isinstance(value, list):
                values[name] = [value[row] for row in rows.tolist()]
        return type(self)(**values)

    def split(self, size: int) -> Iterator[Self]:
        """Consecutive pieces of at most `size` rows."""
        for rows in torch.split(torch.arange(len(self)), size):
            yield self.select(rows)


@dataclass(frozen=True)
class Rollout(TokenBatch):
    """Sampled responses; row b·samples_per_prompt + g is sample g of prompt b.

    Attributes:
        logprobs: [B, T] log π(token) at the sampling temperature, 0 where masked.
        transcripts: all text after each of the B prompts, for people to read.
        values: [B, T] V(state in which the token was chosen), 0 where masked; only from a sampler with a value head.
        engine_logprobs: [B, T] by the engine that sampled, where that is not the trainer's own model; see
            `tasks.rl.mismatch`. `logprobs` are always those of the trainer's model.
    """

    logprobs: Tensor
    has_eos: Tensor  # [B]
    transcripts: list[str]
    pad_token_id: int
    values: Tensor | None = None
    engine_logprobs: Tensor | None = None

    def gather(self) -> Self:
        """Gather the rollouts of all ranks, in order of rank."""
        gathered: dict[str, Any] = dict(vars(self))
        for name, value in gathered.items():
            if isinstance(value, Tensor):
                pad = self.pad_token_id if name in ("prompts", "responses") else 0
                gathered[name] = distributed.all_gather(value, pad=pad, left=name in ("prompts", "prompt_mask"))
            elif isinstance(value, list):
                gathered[name] = distributed.all_gather_texts(value)
        return type(self)(**gathered)

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

    def select(self, positions: Sequence[int]) -> BatchRows:
        """The rows at these positions, of the same batch."""
        return BatchRows([self.rows[position] for position in positions], self.total)


@dataclass(frozen=True)
class PromptBatch:
    """Prompts as texts and token ids, each of which gets `samples` responses."""

    texts: list[str]
    token_ids: list[list[int]]
    samples: int
    ids: Tensor  # [B · samples, P] padded on the left
    mask: Tensor  # [B · samples, P]

    @classmethod
    def encode(
        cls,
        prompts: Sequence[Prompt] | Sequence[str] | Sequence[Sequence[int]],
        tokenizer: Any,
        samples: int,
        encode: Callable[[Any, str], list[int]],
    ) -> Self:
        """Encode prompts, which are rows, texts, or token ids; ConfigError where a text is empty."""
        given = [prompt.prompt if isinstance(prompt, Prompt) else prompt for prompt in prompts]
        if "" in given:
            raise ConfigError("prompt '' is empty: write at least a word")
        token_ids = [encode(tokenizer, prompt) if isinstance(prompt, str) else list(prompt) for prompt in given]
        texts = [prompt if isinstance(prompt, str) else decode_response(tokenizer, [], prompt) for prompt in given]
        padded = pad_ids(token_ids, tokenizer.pad_token_id, side="left")
        ids, mask = (tensor.repeat_interleave(samples, 0) for tensor in padded)
        return cls(texts, token_ids, samples, ids, mask)

    def to_rollout(self, columns: SampledTokens, tokenizer: Any, *, has_values: bool) -> Rollout:
        """The rollout of the sampled tokens, on their device and as wide as the longest response."""
        width = int(columns.mask.sum(1).max())
        responses, response_mask = columns.tokens[:, :width], columns.mask[:, :width]
        has_eos = ((responses == tokenizer.eos_token_id) & response_mask).any(1)
        lengths = (response_mask.sum(1) - has_eos.long()).tolist()
        texts = [
            decode_response(tokenizer, self.token_ids[row // self.samples], responses[row, :length].tolist())
            for row, length in enumerate(lengths)
        ]
        return Rollout(
            prompts=self.ids.to(responses.device),
            prompt_mask=self.mask.to(responses.device),
            responses=responses,
            response_mask=response_mask,
            logprobs=columns.logprobs[:, :width],
            has_eos=has_eos,
            prompt_texts=[text for text in self.texts for _ in range(self.samples)],
            texts=texts,
            transcripts=texts,
            pad_token_id=tokenizer.pad_token_id,
            values=columns.values[:, :width] if has_values else None,
        )


class Sampler:
    """Source of responses: a model in this process, or an engine elsewhere that takes and returns token ids."""

    def __init__(self, model: Any, tokenizer: Any, generation: GenerationParams) -> None:
        self.tokenizer, self._model, self._generation = tokenizer, model, generation
        self._encode: Callable[[Any, str], list[int]] = encode_prompt

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt] | Sequence[str] | Sequence[Sequence[int]],
        generator: torch.Generator,
        *,
        samples_per_prompt: int = 1,
        batch_rows: BatchRows | None = None,
    ) -> Rollout:
        """Sample responses to prompts, which are rows, texts, or token ids; the rollout is on the model's device.

        T is `max_new_tokens`, or less when every response ended earlier.

        Args:
            generator: source of all random numbers; on the CPU.
            batch_rows: position of each response in a larger batch; None: these are all responses.

        Raises:
            ConfigError: a prompt is empty.
            ModelError: prompt and response may be longer than the model's context.
        """
        batch = PromptBatch.encode(prompts, self.tokenizer, samples_per_prompt, self._encode)
        longest, new = max(map(len, batch.token_ids)), self._generation.max_new_tokens
        reason = f"a prompt of {longest} tokens and generation.max_new_tokens {new}: lower one of them"
        check_context(context_length(self._model.config), longest + new, reason)
        return self._generate(batch, batch_rows or BatchRows(range(len(batch.ids)), len(batch.ids)), generator)

    def _generate(self, batch: PromptBatch, rows: BatchRows, generator: torch.Generator) -> Rollout:
        """Sample the responses at these rows of a larger batch."""
        raise NotImplementedError

    def update_weights(self) -> None:
        """Take up the policy as it is now, where it is a copy; called before each update's first sample."""


class LocalSampler(Sampler):
    """Sampler of softmax(logits / temperature) of a model in this process, with or without adapters."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        generation: GenerationParams,
        value_head: nn.Module | None = None,
        *,
        chat_template: bool = False,
    ) -> None:
        """Keep the model and the settings.

        Args:
            value_head: maps the last hidden state [B, d], which decoding computes anyway, to values [B, 1].
            chat_template: format each prompt as a user's message; ConfigError where the tokenizer has no template.
        """
        if chat_template and not tokenizer.chat_template:
            raise ConfigError("the model's tokenizer has no chat template: leave --chat-template out")
        super().__init__(model, tokenizer, generation)
        self._value_head, self._encode = value_head, encode_chat if chat_template else encode_prompt

    def _generate(self, batch: PromptBatch, rows: BatchRows, generator: torch.Generator) -> Rollout:
        """Sample a token of every row that has not ended, step by step.

        One uniform number per row and step is drawn from the generator, for ended rows and those of other parts too, so
        that a row's sample does not depend on them.
        """
        ids, mask = (tensor.to(next(self._model.parameters()).device) for tensor in (batch.ids, batch.mask))
        length, row_numbers = self._generation.max_new_tokens, torch.tensor(rows.rows)
        columns = SampledTokens(len(ids), length, self.tokenizer.pad_token_id, ids.device)
        with merged_weights(self._model):
            decoder = Decoder(self._model, self._value_head, ids, mask, batch.samples, length)
            for step in range(length):
                uniform = torch.rand(rows.total, generator=generator)[row_numbers].to(ids.device)[decoder.rows]
                token, logprob = sample_tokens(decoder.logits, self._generation.temperature, uniform)
                columns.write(step, decoder, token, logprob)
                unfinished = (token != self.tokenizer.eos_token_id).nonzero().squeeze(1)
                if unfinished.numel() == 0 or step + 1 == length:
                    break
                decoder.feed(token, unfinished)
        return batch.to_rollout(columns, self.tokenizer, has_values=self._value_head is not None)


def load_sampler(
    folder: Path, policy: str, generation: GenerationParams, *, chat_template: bool = False
) -> LocalSampler:
    """Load the sampler of a policy stage, or of the SFT model for `sft`, from a folder laid out as the artifacts."""
    init_process()
    base_model, sft = folder / "base_model", folder / "sft"
    is_reference = policy == sft.name
    model = load_reference(base_model, sft) if is_reference else load_policy(base_model, sft, folder / policy)
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
    return torch.Generator().manual_seed(reduce(_extend_seed, parts, 0))


def extend_generator(generator: torch.Generator, part: int) -> torch.Generator:
    """`derive_generator(*parts, part)` from `derive_generator(*parts)`."""
    return torch.Generator().manual_seed(_extend_seed(generator.initial_seed(), part))


def _extend_seed(seed: int, part: int) -> int:
    return (seed * 1_000_003 + part + 1) % (2**63 - 25)
