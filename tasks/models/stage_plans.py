"""Plans of the stages of params.yaml on some hardware: see `tasks.models.plan` for what is counted and how."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from tasks.config.base import LEARNED
from tasks.core.errors import ConfigError
from tasks.data.fit import Misfit, row_lengths
from tasks.models.encoding import context_length
from tasks.models.fetch import READERS
from tasks.models.loading import MODEL_DIR, init_process
from tasks.models.plan import Memory, ModelSize, Phase, sampling_phases, trainer_phases, update_phases

if TYPE_CHECKING:
    from tasks.config.params import Params

__all__ = [
    "GPUS",
    "Hardware",
    "StagePlan",
    "base_config",
    "detect_hardware",
    "known_gpu",
    "memory_misfits",
    "plan_stages",
]

GPUS = {
    "h200": (141e9, 989e12, 4.8e12), "h100": (80e9, 989e12, 3.35e12), "a100": (80e9, 312e12, 2.039e12),
    "a100-40": (40e9, 312e12, 1.555e12), "l40s": (48e9, 362e12, 0.864e12), "l4": (24e9, 121e12, 0.3e12),
    "4090": (24e9, 165e12, 1.008e12),
}  # fmt: skip
"""Name → bytes of memory, dense bfloat16 FLOP/s with float32 sums, bytes/s of memory: NVIDIA's datasheets of H200, H100
and A100 (SXM; half of the figures "with sparsity"), L40S, L4, and its Ada whitepaper (RTX 4090)."""

MFU = {True: 0.3, False: 0.5}
"""On a GPU or not → share of the rate of matrix products that training is assumed to reach. On a GPU a guess below the
46 % of PaLM (Chowdhery et al. 2022, arXiv 2204.02311, table 3), because batches are small here."""

TOKENS_PER_WORD = 1.5  # assumed until stage prepare has counted


@dataclass(frozen=True)
class Hardware:
    """`count` equal devices, each of which holds whole models; rates of one are in FLOP/s and bytes/s."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    on_gpu: bool = True
    count: int = 1


@dataclass(frozen=True)
class StagePlan:
    """What a stage needs at its worst moment, and the setting that this follows with the largest value that fits."""

    stage: str
    trained: int
    memory: Memory
    fits: bool
    key: str
    value: int
    largest: int
    tokens: float
    flops: float
    seconds: float


def known_gpu(name: str, *, nodes: int = 1) -> Hardware:
    """Hardware of a datasheet by its name, with a number of GPUs a node, as `h100:8`; ConfigError for another name."""
    kind, _, count = name.lower().partition(":")
    if kind not in GPUS or not (count or "1").isdecimal() or count == "0":
        raise ConfigError(f"--gpu {name}: it is NAME or NAME:COUNT, with one of {', '.join(GPUS)}")
    return Hardware(kind.upper(), *GPUS[kind], count=int(count or 1) * nodes)


def detect_hardware(*, nodes: int = 1) -> Hardware:
    """This machine's GPUs, or else its CPU with all of its memory, at rates measured in half a second."""
    on_gpu = torch.cuda.is_available()
    device, kind = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    square = torch.randn((8192 if on_gpu else 1024,) * 2, dtype=kind, device=device)
    flops = 2 * square.shape[0] ** 3 / _seconds(lambda: square @ square)
    bandwidth = 2 * square.nbytes / _seconds(square.clone)
    if on_gpu:
        found = torch.cuda.get_device_properties(0)
        return Hardware(found.name, found.total_memory, flops, bandwidth, count=torch.cuda.device_count() * nodes)
    return Hardware(f"{os.cpu_count()} CPU cores", _cpu_memory(), flops, bandwidth, on_gpu=False, count=nodes)


def _seconds(compute: Any) -> float:
    """Seconds of a call, the best of five."""
    found = []
    for _ in range(5):
        started = time.perf_counter()
        compute()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return min(found)


def _cpu_memory() -> float:
    """Bytes of this machine's memory, or what its control group may take."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.is_file() else "max"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(total, int(text)) if text.isdecimal() else total


def base_config(params: Params, base_model: Path | None) -> Any:
    """Configuration of the base model: from the stage's folder, or from the model's own files where they are here.

    Raises:
        ConfigError: they are not.
    """
    own = params.base_model
    if base_model is None and own.kind == "random":
        return READERS["random"](own, params.seed)[0].config
    folder: Path | str = base_model / MODEL_DIR if base_model else Path(own.id).expanduser()
    if not base_model and own.kind == "hub":
        folder = own.id
    try:
        config = AutoConfig.from_pretrained(folder, revision=own.revision, local_files_only=True)
    except (OSError, ValueError) as error:
        cure = "run `rlhf run base_model` first"
        raise ConfigError(f"the configuration of base_model {own.id} is not on this machine: {cure}") from error
    return config.get_text_config()


class _Planner:
    """Plans one stage at a time."""

    def __init__(self, params: Params, config: Any, lengths: Mapping[str, list[int]], hardware: Hardware) -> None:
        self.params, self.config, self.hardware, self._lengths = params, config, hardware, lengths
        self._context = context_length(config) or sys.maxsize

    def lengths(self, stage: str, limit: int) -> list[int]:
        """Tokens of the rows, at most so many, that a stage reads; assumed where they are not known."""
        setting: Any = getattr(getattr(self.params, stage, None), "max_length", "auto")
        most = self._context if setting == "auto" else setting
        if own := self._lengths.get(stage, [])[:limit]:
            return [min(length, most) for length in own]
        words = self.params.prepare.prompt_words if stage == "prompts" else self.params.prepare.max_words
        return [min(int(TOKENS_PER_WORD * words) + 2, most) if setting == "auto" else setting] * limit

    def size(self, *, score: bool = False, first_layer: int = 0) -> ModelSize:
        return ModelSize(
            self.config, self.params.lora, on_gpu=self.hardware.on_gpu, score=score, first_layer=first_layer
        )

    def trainer(self, stage: str) -> tuple[ModelSize, list[Phase], float, float, float]:
        """Size, phases, tokens, FLOPs and seconds of reading weights of a stage with a trainer of Hugging Face."""
        params, section = self.params, getattr(self.params, stage)
        kind, loss = getattr(section, "kind", ""), getattr(section, "loss_type", "")
        rows = 2 if kind in ("preference", "multi_objective") or loss not in ("", "kto") else 1
        pairs = params.preferences.train_pairs if params.preferences else 1
        limit = getattr(section, "max_examples", None) or min(getattr(section, "max_pairs", pairs), pairs)
        own = self.lengths(stage, limit)
        size = self.size(score=bool(kind), first_layer=getattr(section, "lora_first_layer", 0))
        reference = bool(loss) and loss not in ("orpo", "simpo")
        phases = trainer_phases(
            size, f"{stage}.batch_size", section.batch_size, max(own), devices=self.hardware.count, rows=rows,
            head="score" if kind else "tiled" if reference or not loss else "full",
            beside=size.weights if reference and params.lora is None else 0, examples=len(own),
            heldout=getattr(section, "max_validation_examples", 0),
        )  # fmt: skip
        tokens = section.epochs * rows * sum(own)
        flops = size.training_flops(tokens, max(own)) + reference * size.forward_flops(tokens, max(own))
        return size, phases, tokens, flops, 0.0

    def sampler(self, stage: str) -> tuple[ModelSize, list[Phase], float, float, float]:
        """The same of a stage that samples: PPO, GRPO, and the evaluation, which trains nothing."""
        params, section, devices = self.params, getattr(self.params, stage), self.hardware.count
        prompts = self.lengths("prompts", 1000)
        turns = params.environment.max_turns if params.environment else 1
        prompt, new = max(prompts), params.generation.max_new_tokens
        response = min(new * (2 * turns - 1), self._context - prompt)  # turns of both sides
        size = self.size()
        learned = size.weights if params.reward_model and LEARNED in params.reward.weights else 0
        own_engine = params.rollout.engine == "transformers"
        passes = 2 + bool(learned)  # sampling, reference, reward model
        if stage == "evaluate":
            policies = sum(getattr(params, name) is not None for name in ("ppo", "grpo", "dpo"))
            draws = policies * section.samples_per_prompt + section.reference_samples + section.best_of_n
            tokens, length = section.prompts * draws * (prompt + response), prompt + response
            phases = sampling_phases(size, "evaluate.batch_size", section.batch_size, prompt, response, beside=learned)
            size.trained, flops = 0, size.forward_flops(tokens, length) * (passes + 1)
            steps, rows, devices = section.prompts * draws / section.batch_size * response, section.batch_size, 1
        else:
            beside = learned + (size.weights if params.lora is None else 0)
            phases = update_phases(
                size, section, prompt, params.generation, response=response, devices=devices, beside=beside,
                own_engine=own_engine,
            )  # fmt: skip
            rows = section.prompts_per_update * section.samples_per_prompt
            tokens, length = section.updates * rows * (sum(prompts) / len(prompts) + response), prompt + response
            flops = size.forward_flops(tokens, length) * passes + section.epochs * size.training_flops(tokens, length)
            steps = section.updates * response
        read = size.weights + size.cache(rows / devices * (prompt + response / 2))
        return size, phases, tokens, flops, steps * read / self.hardware.bandwidth

    def plan(self, stage: str, mfu: float) -> StagePlan:
        sampled = not hasattr(getattr(self.params, stage), "max_length")
        size, phases, tokens, flops, reading = (self.sampler if sampled else self.trainer)(stage)
        limit, hardware = self.hardware.memory, self.hardware
        worst = max(phases, key=lambda phase: phase.memory(phase.value).total)
        memory = worst.memory(worst.value)
        largest = min(phase.largest(limit) for phase in phases if phase.key == worst.key)
        seconds = flops / (hardware.flops * mfu * (1 if stage == "evaluate" else hardware.count)) + reading
        fits = memory.total <= limit
        return StagePlan(stage, size.trained, memory, fits, worst.key, worst.value, largest, tokens, flops, seconds)


STAGES = ("sft", "reward_model", "gold_judge", "ppo", "grpo", "dpo", "evaluate")


def plan_stages(
    params: Params, base_model: Path | None, prepare: Path | None, hardware: Hardware, *, mfu: float | None = None
) -> list[StagePlan]:
    """Plan every stage that is on, but overoptimisation and lm_eval, which need no more memory than evaluate.

    Args:
        base_model, prepare: folders of the stages' outputs; None where they are not up to date.
        mfu: share of the rate of matrix products that is reached; None for `MFU`.

    Raises:
        ConfigError: the base model's configuration is not on this machine.
    """
    init_process()  # which silences the libraries
    lengths = row_lengths(params, base_model, prepare) if base_model and prepare else {}
    planner = _Planner(params, base_config(params, base_model), lengths, hardware)
    names = [name for name in STAGES if getattr(params, name) is not None]
    if params.reward_model and params.reward_model.pretrained:
        names.remove("reward_model")
    return [planner.plan(name, mfu or MFU[hardware.on_gpu]) for name in names]


def memory_misfits(
    plans: Sequence[StagePlan], stages: Collection[str], hardware: Hardware, *, blocks: bool
) -> Iterator[Misfit]:
    """The settings of those of these stages that do not fit into memory."""
    for plan in plans:
        if plan.stage in stages and not plan.fits:
            cure = "" if plan.largest else "even 1 is too many: shorter rows, a smaller base_model, or adapters; "
            reason = f"needs {plan.memory.total / 1e9:.1f} of {hardware.memory / 1e9:.1f} GB; {cure}--anyway runs it"
            yield Misfit(plan.stage, plan.key, plan.value, str(plan.largest or ""), reason, blocks)
