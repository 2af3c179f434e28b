"""Sampling by vLLM: the base model on servers, and the policy as an adapter that each update replaces.

One adapter holds what SFT and the policy have learned, because a sum of low-rank updates is a low-rank update. Every
update's adapter has a name of its own, so a server that missed one cannot answer in its place.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from safetensors.torch import load_file, save_file

from tasks.core import distributed
from tasks.core.errors import ConfigError, ModelError, SourceError
from tasks.core.paths import Artifacts, state_dir
from tasks.models.loading import ADAPTER_DIR, MODEL_DIR, dtype, save_weights
from tasks.rl.decoding import SampledTokens
from tasks.rl.masking import zero_masked
from tasks.rl.mismatch import check_mismatch
from tasks.rl.policy import Policy
from tasks.rl.rollout import BatchRows, LocalSampler, PromptBatch, Rollout, Sampler
from tasks.rl.vllm_server import OwnServer, VLLMServer

if TYPE_CHECKING:
    from tasks.config.rl import RolloutParams
    from tasks.config.training import GenerationParams, LoraParams

__all__ = ["VLLMSampler", "open_sampler", "sum_adapters"]

URLS_VARIABLE = "RLHF_ROLLOUT_URLS"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's choices of --max-lora-rank
MAX_REQUESTS = 256  # at a time; vLLM queues what does not fit into its batch
GREEDY = 1e-5  # vLLM decodes greedily at temperature 0, and below this would divide by it
PROBE = "The"


@contextmanager
def open_sampler(
    policy: Policy,
    tokenizer: Any,
    generation: GenerationParams,
    params: RolloutParams,
    lora: LoraParams | None,
    artifacts: Artifacts,
    *,
    micro_batch_size: int,
) -> Iterator[Sampler]:
    """Open the sampler that `rollout` chooses; an engine's servers end with it.

    Raises:
        ConfigError: vLLM is not installed, or several ranks would each start a server.
        SourceError: a server does not answer.
        TrainingError: it serves another model.
    """
    if params.engine == "transformers":
        yield LocalSampler(policy.model, tokenizer, generation, policy.value_head)
        return
    assert lora is not None, "params.yaml is refused if vllm has no adapter to take"
    with ExitStack() as stack:
        servers = _open_servers(params, lora, artifacts.base_model)
        for server in servers:
            stack.callback(server.close)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rlhf-adapters-"))
        sampler = VLLMSampler(
            policy, tokenizer, generation, params, servers,
            sft=artifacts.sft, folder=Path(folder), micro_batch_size=micro_batch_size,
        )  # fmt: skip
        stack.callback(sampler.unload)
        sampler.update_weights()
        sampler.sample([PROBE], torch.Generator().manual_seed(0))  # a wrong model or server is found before training
        yield sampler


def _open_servers(params: RolloutParams, lora: LoraParams, base_model: Path) -> list[VLLMServer]:
    addresses = (url.strip().rstrip("/") for url in os.environ.get(URLS_VARIABLE, "").split(","))
    if urls := list(dict.fromkeys(filter(None, addresses))):
        if wrong := [url for url in urls if not url.startswith(("http://", "https://"))]:
            raise ConfigError(f"${URLS_VARIABLE}: {wrong[0]!r} is no address like http://127.0.0.1:8000")
        servers = [VLLMServer(url) for url in urls]
        if down := [server.url for server in servers if not server.is_up()]:
            raise SourceError(f"${URLS_VARIABLE}: {', '.join(down)} does not answer: start it, or remove it there")
        return servers
    if distributed.world_size() > 1:
        raise ConfigError(f"several ranks share servers that run already: name their addresses in ${URLS_VARIABLE}")
    rank = next((rank for rank in RANKS if rank >= 2 * lora.r), None)
    if rank is None:
        raise ConfigError(f"lora.r is {lora.r}; SFT's and the policy's together are at most {RANKS[-1]} for vllm")
    number = str(dtype()).removeprefix("torch.") if params.dtype == "auto" else params.dtype
    log = state_dir() / "logs" / "vllm.log"
    return [OwnServer(base_model / MODEL_DIR, dtype=number, max_lora_rank=rank, log=log)]


class VLLMSampler(Sampler):
    """Sampler of softmax(logits / temperature) of the policy, on servers that hold the base model.

    The trainer's model reads every response once, for its own log-probabilities and values.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: Any,
        generation: GenerationParams,
        params: RolloutParams,
        servers: Sequence[VLLMServer],
        *,
        sft: Path,
        folder: Path,
        micro_batch_size: int,
    ) -> None:
        """Keep the settings.

        Args:
            sft: folder of the SFT stage.
            folder: where adapters are written; every server must see it.
            micro_batch_size: sequences per forward pass of the trainer's model.
        """
        super().__init__(policy.model, tokenizer, generation)
        self._policy, self._params, self._servers = policy, params, servers
        self._micro_batch_size = micro_batch_size
        self._sft, self._folder, self._names = sft, folder, f"policy-{uuid4().hex[:8]}"
        self._version = 0

    @property
    def _name(self) -> str:
        return f"{self._names}-{self._version}"

    def update_weights(self) -> None:
        """Write the policy's adapter, load it on every server under a new name, and unload the one before."""
        old, self._version = self._name, self._version + 1
        save_weights(self._policy.model, self._folder)
        sum_adapters([self._sft / ADAPTER_DIR, self._folder / ADAPTER_DIR], self._folder / self._name)
        for server in self._servers:
            self._load(server)
            if (self._folder / old).is_dir():
                server.post("/v1/unload_lora_adapter", {"lora_name": old})
        shutil.rmtree(self._folder / old, ignore_errors=True)

    def unload(self) -> None:
        """Take the last adapter from the servers; one that does not answer any more needs none."""
        for server in self._servers:
            with suppress(SourceError):
                server.post("/v1/unload_lora_adapter", {"lora_name": self._name})

    def _load(self, server: VLLMServer) -> None:
        server.post("/v1/load_lora_adapter", {"lora_name": self._name, "lora_path": str(self._folder / self._name)})

    def _generate(self, batch: PromptBatch, rows: BatchRows, generator: torch.Generator) -> Rollout:
        """Sample responses, each with a seed of its own, which does not depend on the other rows.

        A server of ours that ends is started again, and the update's responses are sampled anew.

        Raises:
            SourceError: a server does not answer, or not as vLLM does.
            TrainingError: it samples from something else than the policy; see `check_mismatch`.
        """
        seeds = torch.randint(2**62, (rows.total,), generator=generator)[torch.tensor(rows.rows)].tolist()
        requests = [self._request(batch.token_ids[row // batch.samples], seed) for row, seed in enumerate(seeds)]
        device, width = next(self._policy.parameters()).device, self._generation.max_new_tokens
        columns = SampledTokens(len(requests), width, self.tokenizer.pad_token_id, device)
        for row, (tokens, logprobs) in enumerate(self._complete(requests, batch.samples)):
            columns.tokens[row, : len(tokens)], columns.mask[row, : len(tokens)] = torch.tensor(tokens), True
            columns.logprobs[row, : len(tokens)] = torch.tensor(logprobs)
        return self._with_trainer_logprobs(batch.to_rollout(columns, self.tokenizer, has_values=False))

    def _request(self, prompt: list[int], seed: int) -> dict[str, Any]:
        temperature = self._generation.temperature
        return {
            "model": self._name,
            "prompt": prompt,
            "max_tokens": self._generation.max_new_tokens,
            "temperature": temperature if temperature > GREEDY else 0.0,
            "seed": seed,
            "logprobs": 0,
            "return_token_ids": True,
        }

    def _complete(self, requests: Sequence[Mapping[str, Any]], samples: int) -> list[tuple[list[int], list[float]]]:
        """Tokens and their log-probabilities of each request; those of one prompt go to one server, for its cache."""
        places = [self._servers[row // samples % len(self._servers)] for row in range(len(requests))]
        with ThreadPoolExecutor(min(MAX_REQUESTS, len(requests))) as pool:
            try:
                return list(pool.map(_post_completion, places, requests))
            except SourceError:
                ended = [server for server in self._servers if server.restart()]
                if not ended:
                    raise
            for server in ended:
                self._load(server)
            return list(pool.map(_post_completion, places, requests))

    def _with_trainer_logprobs(self, rollout: Rollout) -> Rollout:
        parts = [self._policy.logprobs_and_values(part) for part in rollout.split(self._micro_batch_size)]
        logprobs, values = (zero_masked(torch.cat(each), rollout.response_mask) for each in zip(*parts, strict=True))
        check_mismatch(logprobs, rollout.logprobs, rollout.response_mask, rollout.texts, self._params)
        return replace(
            rollout,
            logprobs=logprobs,
            values=None if self._policy.value_head is None else values,
            engine_logprobs=rollout.logprobs,
        )


def _post_completion(server: VLLMServer, request: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    answer = server.post("/v1/completions", request)
    try:
        (choice,) = answer["choices"]
        tokens, logprobs = list(choice["token_ids"]), list(choice["logprobs"]["token_logprobs"])
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(
            f"{server.url} does not answer with token ids and log-probabilities: it is no vLLM "
            "server, or an old one (0.32 is known to work)"
        ) from error
    if len(tokens) != len(logprobs) or not tokens:
        raise SourceError(f"{server.url}: {len(tokens)} tokens with {len(logprobs)} log-probabilities")
    return tokens, logprobs


def sum_adapters(folders: Sequence[Path], out: Path) -> None:
    """Write one LoRA adapter whose update is the sum of those of several: Σ s·BA, with s = alpha / r.

    The A are stacked and the s·B stand side by side, so the rank is the sum of the ranks.

    Raises:
        ModelError: they adapt different modules.
    """
    parts = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    configs = [json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")) for folder in folders]
    if len({frozenset(part) for part in parts}) > 1:
        raise ModelError(f"{' and '.join(map(str, folders))} adapt different modules: run sft again")
    scales = [config["lora_alpha"] / config["r"] for config in configs]
    rank = sum(config["r"] for config in configs)
    summed = {
        name: torch.cat([part[name] for part in parts], dim=0)
        if "lora_A" in name
        else torch.cat([scale * part[name] for part, scale in zip(parts, scales, strict=True)], dim=1)
        for name in parts[0]
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in summed.items()}, out / "adapter_model.safetensors")
    config = configs[-1] | {"r": rank, "lora_alpha": rank}
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
