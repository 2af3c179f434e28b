"""Sampling speed against `transformers.generate` and the machine's limit: `make bench-rollout`.

The limit is the time of the matrix products alone: the floating-point operations of the linear layers for a token,
divided into the rate at which this machine multiplies large float32 matrices, measured in the same run. LoRA is active
on every linear layer. Two shapes: 16 prompts, and 8 prompts with 4 samples each. No response ends early. Prints the
medians and, last, one JSON line.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from inputs import MODEL, PROMPT_TOKENS, RESPONSE_TOKENS, check_model, load_tokenizer, lora_config, prompts, repetitions
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from tasks.config.training import GenerationParams
from tasks.models.loading import init_process
from tasks.models.onednn_linear import freeze_for_onednn, register_frozen_lora
from tasks.rl.rollout import LocalSampler

SHAPES = {"16": (16, 1), "8x4": (8, 4)}
SIDE = 2048
"""Size of the square matrices whose product measures the machine."""


def sample_with_ours(model: Any, count: int, samples: int) -> None:
    sampler = LocalSampler(model, load_tokenizer(), GenerationParams(max_new_tokens=RESPONSE_TOKENS, temperature=1.0))
    rollout = sampler.sample(prompts(count), torch.Generator().manual_seed(0), samples_per_prompt=samples)
    assert rollout.responses.shape == (count * samples, RESPONSE_TOKENS)


def sample_with_transformers(model: Any, count: int, samples: int) -> None:
    torch.manual_seed(0)
    ids = torch.tensor(prompts(count))
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
        min_new_tokens=RESPONSE_TOKENS, max_new_tokens=RESPONSE_TOKENS, num_return_sequences=samples, pad_token_id=0,
    )  # fmt: skip
    assert output.shape == (count * samples, PROMPT_TOKENS + RESPONSE_TOKENS)


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def multiplications_per_second() -> dict[str, float]:
    """Measure FLOP/s of a large matrix product, the best of ten, by torch and by oneDNN."""
    matrix_a, layer = torch.randn(SIDE, SIDE), torch.nn.Linear(SIDE, SIDE, bias=False)
    matrix = layer.weight.detach()
    freeze_for_onednn(layer)
    products: dict[str, Callable[[], object]] = {"torch": lambda: matrix_a @ matrix, "onednn": lambda: layer(matrix_a)}
    return {name: 2 * SIDE**3 / min(seconds(call) for _ in range(10)) for name, call in products.items()}


def operations_per_token(model: nn.Module) -> float:
    """Count 2 × the weights of the linear layers, with the head and without LoRA."""
    return 2.0 * sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name
    )


def main() -> None:
    rounds = repetitions(__doc__)
    check_model()
    init_process()
    theirs, base = (AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32) for _ in range(2))
    freeze_for_onednn(base)
    models = {
        "ours": get_peft_model(base, register_frozen_lora(lora_config())).eval(),
        "transformers": get_peft_model(theirs, lora_config()).eval(),
    }
    limits = {name: speed / operations_per_token(base) for name, speed in multiplications_per_second().items()}
    print("limit by matrix products: " + ", ".join(f"{name} {limit:.0f} tokens/s" for name, limit in limits.items()))
    result: dict[str, float] = {f"limit_{name}": round(limit, 1) for name, limit in limits.items()}
    result["repetitions"] = rounds
    for shape, (count, samples) in SHAPES.items():
        sides = {"ours": sample_with_ours, "transformers": sample_with_transformers}
        times: dict[str, list[float]] = {name: [] for name in sides}
        for repetition in range(rounds + 1):
            for name, sample in sides.items():
                taken = seconds(partial(sample, models[name], count, samples))
                if repetition:  # the first warms up
                    times[name].append(taken)
        rates = {name: count * samples * RESPONSE_TOKENS / statistics.median(taken) for name, taken in times.items()}
        print(f"{shape}: " + ", ".join(f"{name} {rate:.0f} tokens/s" for name, rate in rates.items()))
        result |= {f"{name}_{shape}": round(rate, 1) for name, rate in rates.items()}
        result |= {f"share_of_{name}_{shape}": round(rates["ours"] / limit, 3) for name, limit in limits.items()}
        result |= {f"ratio_{shape}": round(rates["ours"] / rates["transformers"], 3)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
