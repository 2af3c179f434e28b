"""What the stages that train or sample need: memory by part, tokens, FLOPs and time, before anything is computed.

Parameters are counted, and what a forward pass keeps for the backward pass is measured, on tensors without data, for
any architecture. The rest are formulas. Python itself, a CUDA context and the allocator's slack come on top.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from copy import deepcopy
from dataclasses import dataclass, fields
from io import StringIO
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tasks.models.loading import make_trainable

if TYPE_CHECKING:
    from tasks.config.rl import RLParams
    from tasks.config.training import GenerationParams, LoraParams

__all__ = ["Memory", "ModelSize", "Phase", "sampling_phases", "trainer_phases", "update_phases"]

TILE_TOKENS, TILE_WIDTH = 4096, 32768
"""trl.kernels.chunked_logprob: logits are computed in tiles of so many tokens and entries of the vocabulary."""


@dataclass(frozen=True)
class Memory:
    """Bytes by part at one moment."""

    weights: float = 0
    gradients: float = 0
    optimiser: float = 0
    activations: float = 0
    logits: float = 0
    cache: float = 0  # keys and values of a decoder

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class Phase:
    """A moment of a stage: the setting that its memory follows, and the memory at a value of that setting."""

    key: str
    value: int
    memory: Callable[[int], Memory]

    def largest(self, limit: float) -> int:
        """The largest value whose memory is within the limit, bytes; 0 if there is none."""
        low, high = 0, 1
        while high < 2**24 and self.memory(high).total <= limit:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.memory(middle).total <= limit else (low, middle)
        return low


class ModelSize:
    """A model as a stage trains it, on tensors without data.

    Attributes:
        weights: bytes.
        trained: number of parameters that are trained.
        linear: number of weights of the linear layers, which a token is multiplied by.
    """

    def __init__(
        self, config: Any, lora: LoraParams | None, *, on_gpu: bool, score: bool = False, first_layer: int = 0
    ) -> None:
        """Count the model with its adapter; with `score` it is a reward model, which has a score in place of logits."""
        self.config, self.lora, self.on_gpu, self._score = config, lora, on_gpu, score
        self.depth, self.itemsize = config.num_hidden_layers, 2 if on_gpu else 4
        self.trained_depth = 1 - first_layer / self.depth
        model = self._build(self.depth, first_layer)
        tensors = list(model.parameters())
        self.weights = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        self.trained = sum(tensor.numel() for tensor in tensors if tensor.requires_grad)
        layers = [module.weight for module in model.modules() if type(module) is torch.nn.Linear]
        self.linear = sum(weight.numel() for weight in layers if lora is None or not weight.requires_grad)

    def _build(self, depth: int, first_layer: int = 0) -> Any:
        config = deepcopy(self.config)
        config.num_hidden_layers = depth
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:depth]
        kind: Any = AutoModelForSequenceClassification if self._score else AutoModelForCausalLM
        if self._score:
            config.num_labels, config.pad_token_id = 1, 0
        with torch.random.fork_rng(devices=[]), torch.device("meta"), redirect_stderr(StringIO()):
            base = kind.from_config(config, dtype=torch.bfloat16 if self.on_gpu else torch.float32)
            head = "score" if self._score else None
            base.requires_grad_(False)
            return make_trainable(base, self.lora, seed=0, head=head, first_layer=first_layer)

    def activations(self, length: int, *, autocast: bool) -> Callable[[float], float]:
        """Rows of this length → bytes that autograd keeps of a forward pass, without the head's logits.

        From passes over one row and two, through one layer and two: both enter linearly.
        """
        models = [self._build(depth) for depth in (1, 2)]
        (one, one_deeper), (two, two_deeper) = (
            [self._saved_bytes(model, rows, length, autocast=autocast) for model in models] for rows in (1, 2)
        )
        more = self.depth * self.trained_depth - 1
        first, second = one + more * (one_deeper - one), two + more * (two_deeper - two)
        return lambda rows: first + (rows - 1) * (second - first)

    def _saved_bytes(self, model: Any, rows: int, length: int, *, autocast: bool) -> float:
        saved: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            saved[storage._cdata] = storage
            return tensor

        named = [*model.named_parameters(), *model.named_buffers()]
        precision = torch.autocast("cpu", torch.bfloat16) if autocast and self.on_gpu else nullcontext()
        with FakeTensorMode(), saved_tensors_hooks(keep, lambda tensor: tensor), precision:
            own = {
                name: torch.empty(value.shape, dtype=value.dtype, requires_grad=value.requires_grad)
                for name, value in named
            }
            inputs: dict[str, Any] = {"input_ids": torch.zeros((rows, length), dtype=torch.long), "use_cache": False}
            # the mask that padded rows get; transformers would look into one of two dimensions
            inputs["attention_mask"] = torch.ones((rows, 1, length, length), dtype=torch.bool)
            functional_call(model, own, kwargs=inputs if self._score else {**inputs, "logits_to_keep": 1})
            resident = {tensor.untyped_storage()._cdata for tensor in own.values()}
        return sum(storage.nbytes() for key, storage in saved.items() if key not in resident)

    def workspace(self, tokens: float, *, backward: bool = False) -> float:
        """Bytes of one layer's intermediate results: the MLP's, and those of the model's width."""
        mlp, width = (1, 2) if backward else (3, 4)
        return tokens * self.itemsize * (mlp * self.config.intermediate_size + width * self.config.hidden_size)

    def cache(self, tokens: float) -> float:
        """Bytes of keys and values."""
        heads = self.config.num_attention_heads
        width = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        kept = getattr(self.config, "num_key_value_heads", None) or heads
        return 2 * self.depth * kept * width * tokens * self.itemsize

    def forward_flops(self, tokens: float, length: float) -> float:
        """2 per weight and token, and 4·T·d per layer and token for attention to T tokens (Chowdhery et al. 2022, arXiv
        2204.02311, appendix B; Kaplan et al. 2020, arXiv 2001.08361, table 1)."""
        return tokens * (2 * self.linear + 4 * self.depth * length * self.config.hidden_size)

    def training_flops(self, tokens: float, length: float) -> float:
        """Forward; as much for the gradients of what layers read, down to the lowest that is trained; 2 per trained
        weight and token for its own: so 6 per weight where all are trained, and about 4 with adapters."""
        return self.forward_flops(tokens, length) * (1 + self.trained_depth) + 2 * self.trained * tokens


def tiled_logits(size: ModelSize, tokens: float, *, backward: bool) -> float:
    """Bytes of TRL's chunked log-probabilities (`trl.kernels.chunked_logprob`), and of the states that they read.

    A tile, and without Triton, so on a CPU, float32 copies of it: about 3 forward and 7¼ backward.
    """
    rows, vocabulary = min(tokens, TILE_TOKENS), size.config.vocab_size
    copies = 0.0 if size.on_gpu else (7.25 if backward else 3.0) * rows * min(vocabulary, TILE_WIDTH) * 4
    return rows * TILE_WIDTH * size.itemsize + copies + 2 * tokens * size.config.hidden_size * 4


def policy_logits(size: ModelSize, rows: float, length: float, *, copies: float, temporary: float) -> float:
    """Bytes of the logits of responses in `tasks.rl.policy`: float32, on a GPU the bfloat16 ones too; and `temporary`
    tensors of a row of the batch."""
    own = length * size.config.vocab_size
    return rows * own * (4 * copies + 2 * size.on_gpu) + temporary * own * 4


def not_at_once(work: float, logits: float) -> float:
    """What intermediate results need beyond the memory of the logits, which are not there at the same time."""
    return max(work - logits, 0.0)


def head_gradient(size: ModelSize) -> float:
    """Bytes of the gradient of the output layer, which is there before any activation is freed."""
    return 0.0 if size.lora else 4.0 * size.config.vocab_size * size.config.hidden_size


def trainer_phases(
    size: ModelSize, key: str, batch: int, length: int, *, devices: int = 1, rows: int = 1, head: str = "tiled",
    beside: float = 0, examples: float = math.inf, heldout: int = 0,
) -> list[Phase]:  # fmt: skip
    """Phases of a step of a trainer of Hugging Face.

    Args:
        rows: sequences of an example, 2 of a pair.
        head: `tiled` logits, all at once (`full`: ORPO and SimPO), or a `score`.
        beside: bytes of other models, as the reference of all parameters.
        examples: how many there are, which a batch can hold at most.
        heldout: how many held-out ones are read as well, four batches at once.
    """
    kept, logits_of = size.activations(length, autocast=True), {"tiled": tiled_logits, "score": lambda *_, **__: 0.0}
    weights, moments = size.weights + beside, 8.0 * size.trained
    gradients = 4.0 * size.trained * (1 if devices == 1 else 2)  # DDP's buckets are copies

    def logits(tokens: float, *, backward: bool) -> float:
        if head == "full":
            return 4 * tokens * size.config.vocab_size * 4
        return logits_of[head](size, tokens, backward=backward)

    own = 0.0 if head == "score" else head_gradient(size)

    def backward(batch: int) -> Memory:
        count = min(batch, examples) * rows / devices
        work, own_logits = size.workspace(count * length, backward=True), logits(count * length, backward=True)
        return Memory(weights, own, moments, kept(count) + not_at_once(work, own_logits), own_logits)

    def evaluation(batch: int) -> Memory:
        tokens = min(4 * batch, heldout) * rows / devices * length
        own_logits = logits(tokens, backward=False)
        return Memory(weights, 0, moments, not_at_once(size.workspace(tokens), own_logits), own_logits)

    step = Phase(key, batch, lambda batch: Memory(weights, gradients + own, moments))
    return [Phase(key, batch, backward), step, *([Phase(key, batch, evaluation)] if heldout else [])]


def sampling_phases(
    size: ModelSize, key: str, prompts: int, prompt: int, response: int, *, samples: int = 1, devices: int = 1,
    beside: float = 0, optimiser: float = 0, gradients: float = 0, values: bool = False, own_engine: bool = True,
) -> list[Phase]:  # fmt: skip
    """Phases of sampling responses to prompts, and of their log-probabilities under the reference.

    Args:
        prompt: tokens of the longest one.
        response: tokens of the longest one.
        values: whether a value head reads the last layer, for which transformers keeps what all layers return.
        own_engine: whether this process samples; else a server does.
    """
    # `merged_weights` copies the linear layers on a CPU
    packed, vocabulary, width = (
        0.0 if size.on_gpu else 4.0 * size.linear,
        size.config.vocab_size,
        size.config.hidden_size,
    )

    def sampling(prompts: int) -> Memory:
        tokens, rows = prompts / devices * prompt, prompts * samples / devices
        states = values * (size.depth + 1) * tokens * width * size.itemsize
        weights, cache = size.weights + beside + packed, size.cache(rows * (prompt + response))
        logits = 4 * rows * vocabulary * 4
        return Memory(
            weights, gradients, optimiser, not_at_once(size.workspace(tokens) + states, logits), logits, cache
        )

    def scoring(prompts: int) -> Memory:
        rows = prompts * samples / devices
        tokens, logits = rows * (prompt + response), policy_logits(size, rows, response, copies=1, temporary=1)
        work = 2 * tokens * width * size.itemsize
        return Memory(
            size.weights + beside, gradients, optimiser, work + not_at_once(size.workspace(tokens), logits), logits
        )

    return [*([Phase(key, prompts, sampling)] if own_engine else []), Phase(key, prompts, scoring)]


def update_phases(
    size: ModelSize, params: RLParams, prompt: int, generation: GenerationParams, *, response: int | None = None,
    devices: int = 1, beside: float = 0, own_engine: bool = True,
) -> list[Phase]:  # fmt: skip
    """Phases of an update of the RL trainer: sampling, scoring, backward, optimiser step.

    Args:
        beside: bytes of other models: the reward model, and the reference of all parameters.
        response: tokens of the longest one, if not those of `generation`.
    """
    stage, length, moments = params.stage, response or generation.max_new_tokens, 8.0 * size.trained
    gradients, kept = 4.0 * size.trained, size.activations(prompt + length - 1, autocast=False)
    copies = 1 + (generation.temperature != 1) + 4 * (params.entropy_coef > 0)
    step_rows = params.prompts_per_update * params.samples_per_prompt / params.minibatches / devices
    weights = size.weights + beside

    def backward(rows: int) -> Memory:
        read = min(rows, step_rows)
        logits = policy_logits(size, read, length, copies=copies, temporary=2)
        work = size.workspace(read * (prompt + length), backward=True)
        earlier = gradients if rows < step_rows else head_gradient(size)
        return Memory(weights, earlier, moments, kept(read) + not_at_once(work, logits), logits)

    sampling = sampling_phases(
        size, f"{stage}.prompts_per_update", params.prompts_per_update, prompt, length, own_engine=own_engine,
        samples=params.samples_per_prompt, devices=devices, beside=beside, optimiser=moments, gradients=gradients,
        values=getattr(params, "has_values", False),
    )  # fmt: skip
    key, temporary = (
        f"{stage}.micro_batch_size",
        gradients if size.on_gpu else 0.0,
    )  # torch's Adam, of all weights at once
    step = Phase(key, params.micro_batch_size, lambda _: Memory(weights, gradients + temporary, moments))
    return [Phase(key, params.micro_batch_size, backward), step, *sampling]
