"""The versions that are served: loaded and compared with what was trained, and switched when an alias moves."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from peft import PeftModel

from tasks.config.rl import RolloutParams
from tasks.config.training import GenerationParams
from tasks.core.errors import ConfigError, first_line
from tasks.core.rows import Prompt, read_rows
from tasks.data.cleaning import hash_uniform
from tasks.models.loading import init_process, load_policy, load_tokenizer
from tasks.rl.mismatch import check_mismatch
from tasks.rl.policy import Policy
from tasks.rl.rollout import LocalSampler
from tasks.runtime import dvc_repo, registry
from tasks.runtime.provenance import provenance_of, restore_weights
from tasks.runtime.registry import Version
from tasks.serving.engine import Engine

__all__ = ["Served", "Versions", "load_version", "serve_policy"]

CHECKED_PROMPTS = 4  # held-out ones, on which served and trained log-probabilities are compared


class Served(NamedTuple):
    """A version, what generates with it, and the settings that it was trained with."""

    number: int
    engine: Engine
    generation: GenerationParams


def load_version(version: Version) -> Served:
    """Load a registered version.

    Raises:
        StageError: its weights, or its held-out prompts, are neither in the DVC cache nor in a remote.
        TrainingError: what is served has other log-probabilities than what was trained.
    """
    init_process()
    origin = provenance_of(version)
    generation = GenerationParams(**origin.parameters["generation"])
    with TemporaryDirectory(prefix="rlhf-model-") as folder:
        parts = Path(folder)
        restore_weights(version, parts)
        dvc_repo.restore(origin.md5_of("artifacts/prepare/prompts"), parts / "prompts")
        prompts = [row.prompt for row in read_rows(parts / "prompts" / "test.jsonl", Prompt)[:CHECKED_PROMPTS]]
        base_model = parts / "base_model"
        policy = load_policy(base_model, parts / "sft", parts / version.policy)
        tokenizer = load_tokenizer(base_model)
    rollout = RolloutParams(**origin.parameters.get("rollout", {}))
    return Served(version.number, serve_policy(policy, tokenizer, generation, prompts, rollout), generation)


def serve_policy(
    policy: Any, tokenizer: Any, generation: GenerationParams, prompts: list[str], params: RolloutParams
) -> Engine:
    """An engine of the policy, its adapter merged; a TrainingError if that changes log-probabilities too much."""
    sampled = LocalSampler(policy, tokenizer, generation).sample(prompts, torch.Generator().manual_seed(0))
    trained, _ = Policy(policy, temperature=generation.temperature, value_head=False).logprobs_and_values(sampled)
    model = policy.merge_and_unload() if isinstance(policy, PeftModel) else policy
    engine, served = Engine(model, tokenizer), torch.zeros_like(trained)
    for row, mask in enumerate(sampled.response_mask):
        ids = sampled.prompts[row][sampled.prompt_mask[row]].tolist()
        scores = engine.score(ids, sampled.responses[row][mask].tolist(), generation.temperature)
        served[row, : len(scores)] = torch.tensor(scores)
    check_mismatch(trained, served, sampled.response_mask, sampled.texts, params)
    return engine


class Versions:
    """What is served under each name: the version asked for, and the canary."""

    def __init__(
        self,
        name: str,
        canary: tuple[str, float] | None = None,
        *,
        find: Callable[[str], Version] = registry.find,
        load: Callable[[Version], Served] = load_version,
    ) -> None:
        self.name, self._canary, self._find, self._load = name, canary, find, load
        self.served: dict[str, Served] = {}
        self.problems: dict[str, str] = {}
        self._failed: dict[str, int] = {}  # numbers of versions that could not be loaded

    async def refresh(self) -> None:
        """Load what an alias names now, and then let it answer; the version before finishes what it has begun.

        A version that cannot be loaded leaves the one before in use; an alias that is gone, nothing.
        """
        for name in [self.name, *([self._canary[0]] if self._canary else [])]:
            try:
                version = await asyncio.to_thread(self._find, name)
            except ConfigError as error:
                self._switch(name, None)
                self.problems[name] = str(error)
                continue
            except Exception as error:  # MLflow is away: what is served stays
                self.problems[name] = f"the registry does not answer: {first_line(error)}"
                continue
            if name in self.served and self.served[name].number == version.number:
                self._clear(name)
            elif self._failed.get(name) != version.number:
                await self._replace(name, version)

    async def _replace(self, name: str, version: Version) -> None:
        try:
            self._switch(name, await asyncio.to_thread(self._load, version))
            self._clear(name)
        except Exception as error:  # of whatever kind: a bad version must not end the good one
            self._failed[name] = version.number
            self.problems[name] = f"version {version.number} is not served: {first_line(error)}"

    def _clear(self, name: str) -> None:
        self.problems.pop(name, None)
        self._failed.pop(name, None)

    def _switch(self, name: str, new: Served | None) -> None:
        old = self.served.pop(name, None)
        if new:
            self.served[name] = new
        if old:
            old.engine.close()

    def choose(self, model: str | None, user: str) -> Served:
        """The version for a request: the one it names, else the canary for its share of the users.

        Raises:
            ConfigError: it names none that is served, or nothing is.
        """
        named = {str(item.number): item for item in self.served.values()} | self.served
        if model not in (None, self.name):
            if model not in named:
                raise ConfigError(f"no model {model!r}; there are {', '.join(named) or 'none'}")
            return named[model]
        if self._canary and user and hash_uniform(user, 0, "canary") < self._canary[1] and self._canary[0] in named:
            return named[self._canary[0]]
        if self.name not in named:
            raise ConfigError(self.problems.get(self.name, f"{self.name} is not loaded yet"))
        return named[self.name]

    def close(self) -> None:
        """End every engine once its jobs are done."""
        for name in list(self.served):
            self._switch(name, None)
