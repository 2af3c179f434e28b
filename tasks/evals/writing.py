"""Sampling of a policy on given prompts, as in training and evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tasks.core.errors import ConfigError
from tasks.evals.compare import REFERENCE
from tasks.models.loading import ADAPTER_DIR, init_process, load_policy, load_reference, load_tokenizer
from tasks.rl.rollout import generate

__all__ = ["Sample", "Sampler", "policy_stages"]

BATCH_SIZE = 32


@dataclass(frozen=True)
class Sample:
    """Sampled response; `ended` is false if it was cut at `max_new_tokens`."""

    prompt: str
    sample_index: int
    response: str
    ended: bool


class Sampler:
    """Sampler of a loaded policy; its random generator continues from call to call."""

    def __init__(
        self,
        artifacts: Path,
        policy: str,
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        chat_template: bool = False,
    ) -> None:
        """Load it.

        Args:
            artifacts: folder with base model, SFT and policy, laid out as the project's artifacts.
            chat_template: format each prompt as a user's message, and not as the beginning of a text.

        Raises:
            ConfigError: the tokenizer has no chat template.
            ModelError: a folder is incomplete.
        """
        init_process()
        base_model, sft = artifacts / "base_model", artifacts / REFERENCE
        self._tokenizer = load_tokenizer(base_model)
        if chat_template and not self._tokenizer.chat_template:
            raise ConfigError(f"the tokenizer of {policy} has no chat template: leave --chat-template out")
        is_reference = policy == REFERENCE
        self._model = (
            load_reference(base_model, sft) if is_reference else load_policy(base_model, sft, artifacts / policy)
        )
        self._chat_template, self._max_new_tokens, self._temperature = chat_template, max_new_tokens, temperature
        self._generator = torch.Generator().manual_seed(seed)

    def sample(self, prompts: Sequence[str], samples: int) -> Iterator[Sample]:
        """Sample responses to each prompt, in order.

        Raises:
            ConfigError: a prompt is empty.
        """
        for start in range(0, len(prompts), BATCH_SIZE):
            batch = prompts[start : start + BATCH_SIZE]
            rollout = generate(
                self._model,
                [self._ids(prompt) for prompt in batch],
                max_new_tokens=self._max_new_tokens,
                temperature=self._temperature,
                eos_token_id=self._tokenizer.eos_token_id,
                pad_token_id=self._tokenizer.pad_token_id,
                generator=self._generator,
                samples_per_prompt=samples,
            )
            for row, (ids, ended) in enumerate(zip(rollout.response_ids(), rollout.has_eos.tolist(), strict=True)):
                text = str(self._tokenizer.decode(ids, skip_special_tokens=True))
                yield Sample(batch[row // samples], row % samples, text, ended)

    def _ids(self, prompt: str) -> list[int]:
        text = prompt
        if self._chat_template:
            message = [{"role": "user", "content": prompt}]
            text = str(self._tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        ids: list[int] = self._tokenizer(text, add_special_tokens=not self._chat_template).input_ids
        if not ids:
            raise ConfigError(f"prompt {prompt!r} is empty: write at least a word")
        return ids


def policy_stages(artifacts: Path) -> list[str]:
    """Stages whose adapter is a causal language model."""
    configs = sorted(artifacts.glob(f"*/{ADAPTER_DIR}/adapter_config.json"))
    kinds = {file.parts[-3]: json.loads(file.read_text(encoding="utf-8"))["task_type"] for file in configs}
    return [stage for stage, kind in kinds.items() if kind == "CAUSAL_LM"]
