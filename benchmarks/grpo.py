"""GRPO update of our trainer against TRL's GRPOTrainer as it comes: `make bench-grpo`.

The same model, LoRA configuration, prompts, lengths, rewards and minibatches, in one process, in turns. No response
ends early. Prints each side's median update and, last, one JSON line.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import warnings
from typing import Any

import torch
from datasets import Dataset
from inputs import MODEL, PROMPT_TOKENS, RESPONSE_TOKENS, check_model, load_tokenizer, lora_config, prompts, repetitions
from peft import get_peft_model
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tasks.config.rl import GRPOParams
from tasks.config.training import GenerationParams
from tasks.core.rows import Prompt
from tasks.models.loading import init_process
from tasks.models.onednn_linear import freeze_for_onednn, register_frozen_lora
from tasks.rewards.composition import CompositeReward
from tasks.rl.callbacks import Callback, Checkpoint
from tasks.rl.grpo import GRPO
from tasks.rl.policy import Policy
from tasks.rl.rollout import LocalSampler
from tasks.rl.trainer import RLTrainer

PROMPTS, SAMPLES, UPDATES = 8, 4, 3


class UpdateTimer:
    """Timer of updates, without the first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


class OurTimer(UpdateTimer, Callback):
    def on_update_end(self, update: int) -> None:
        self.times.append(time.perf_counter())


class TRLTimer(UpdateTimer, TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())


def rewards(texts: list[str]) -> list[float]:
    return [float(len(text) % 7) for text in texts]


def train_ours(model: Any, tokenizer: Any, texts: list[str], timer: OurTimer) -> None:
    params = GRPOParams(
        updates=UPDATES + 1, prompts_per_update=PROMPTS, samples_per_prompt=SAMPLES, epochs=1, minibatches=1,
        micro_batch_size=PROMPTS * SAMPLES, learning_rate=1e-5, loss_type="grpo", clip_range=0.2, max_grad_norm=1.0,
        kl_coef=0.05, missing_eos_penalty=0.0, checkpoint_every=100, snapshot_every=100,
    )  # fmt: skip
    generation = GenerationParams(max_new_tokens=RESPONSE_TOKENS, temperature=1.0)
    freeze_for_onednn(model)
    adapted = get_peft_model(model.requires_grad_(False), register_frozen_lora(lora_config())).eval()
    RLTrainer(
        Policy(adapted, temperature=1.0, value_head=False), LocalSampler(adapted, tokenizer, generation),
        [Prompt(id=text, prompt=text) for text in texts],
        CompositeReward({"rule": lambda prompts, responses: rewards(responses)}, {"rule": 1.0}),
        GRPO(params, max_new_tokens=RESPONSE_TOKENS), seed=0, checkpoint=Checkpoint(None), callbacks=[timer],
    ).train()  # fmt: skip


def train_trl(model: Any, tokenizer: Any, texts: list[str], timer: TRLTimer) -> None:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=PROMPTS * SAMPLES, num_generations=SAMPLES, beta=0.05,
            max_completion_length=RESPONSE_TOKENS, max_steps=UPDATES + 1, learning_rate=1e-5, bf16=False, use_cpu=True,
            gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=model, reward_funcs=[lambda completions, **_: rewards(completions)], args=arguments,
            processing_class=tokenizer, peft_config=lora_config(), callbacks=[timer],
            train_dataset=Dataset.from_dict({"prompt": texts}),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def update_seconds(side: str) -> list[float]:
    """Measure the seconds of each update of a new trainer."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    texts = [tokenizer.decode(row) for row in prompts(PROMPTS)]
    timer: OurTimer | TRLTimer = OurTimer() if side == "ours" else TRLTimer()
    train: Any = train_ours if side == "ours" else train_trl
    train(model, tokenizer, texts, timer)
    return timer.seconds()


def main() -> None:
    count = repetitions(__doc__)
    check_model()
    init_process()
    times: dict[str, list[float]] = {"ours": [], "default": []}
    for _ in range(count):
        for side, taken in times.items():
            taken += update_seconds(side)
    medians = {side: statistics.median(taken) for side, taken in times.items()}
    tokens = {"prompt_tokens": PROMPT_TOKENS, "response_tokens": RESPONSE_TOKENS, "responses": PROMPTS * SAMPLES}
    for side, median in medians.items():
        print(f"{side}: {median:.2f} s an update")
    ratio = round(medians["default"] / medians["ours"], 3)
    print(json.dumps({"ratio_wall": ratio, "repetitions": count, "updates": UPDATES, **tokens}))


if __name__ == "__main__":
    main()
