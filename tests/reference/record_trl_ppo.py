"""Let TRL 1.12.0, the last release with a PPO trainer, run two updates on a tiny model; write down what it computed.

    python -m venv trl-1.12 && trl-1.12/bin/pip install trl==1.12.0 torch==2.13.0
    trl-1.12/bin/python tests/reference/record_trl_ppo.py tests/reference/trl_1_12_0_ppo.json

Nothing of TRL is changed: its `masked_whiten` and `masked_mean` are wrapped, and each time they are called the local
variables of the training loop are read. Two cases: responses that all have full length, and responses that end early.
"""

import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

VOCABULARY = 16
PAD, END = 0, 1
BATCH = 6
ROLLOUT = ("logprobs", "ref_logprobs", "values", "scores", "kl", "rewards", "advantages", "returns")
MINIBATCH = (
    "new_logprobs", "mb_logprobs", "mb_advantage", "mb_values", "mb_return", "vpred", "vf_loss", "vf_clipfrac",
    "pg_loss",
)  # fmt: skip


def config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.4, pad_token_id=PAD, eos_token_id=END, bos_token_id=2, **changes,
    )  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": PAD, "<end>": END} | {f"w{number}": number for number in range(2, VOCABULARY)}
    words_only = Tokenizer(models.WordLevel(words, unk_token="w2"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words_only, pad_token="<pad>", eos_token="<end>")


def plain(value: Any) -> Any:
    return value.detach().double().tolist() if isinstance(value, torch.Tensor) else value


def record(stop_token: str | None, temperature: float, **options: Any) -> dict[str, Any]:
    """One training run of two updates; what is kept is the second rollout and the last optimiser step on it."""
    seen: dict[str, Any] = {}
    whiten, mean = ppo_trainer.masked_whiten, ppo_trainer.masked_mean

    def watched_whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
        loop = sys._getframe(1).f_locals
        seen["rollout"] = {name: plain(loop[name]) for name in ROLLOUT} | {"mask": mask.tolist()}
        result = whiten(values, mask, shift_mean)
        seen["rollout"]["whitened"] = plain(result)
        return result

    def watched_mean(values: torch.Tensor, mask: torch.Tensor, axis: bool | None = None) -> torch.Tensor:
        result = mean(values, mask, axis)
        loop = sys._getframe(1).f_locals
        if "pg_loss" in loop:  # the last call of a step: the clip fraction
            seen["step"] = {name: plain(loop[name]) for name in MINIBATCH}
            seen["step"] |= {"pg_clipfrac": result.item(), "mask": mask.tolist()}
            beyond = ~loop["padding_mask_p1"][loop["micro_batch_inds"]]
            seen["step"]["value_mask"] = beyond.tolist()
        return result

    ppo_trainer.masked_whiten, ppo_trainer.masked_mean = watched_whiten, watched_mean
    torch.manual_seed(3)
    policy = LlamaForCausalLM(config())
    value = LlamaForSequenceClassification(config(num_labels=1))
    reward = LlamaForSequenceClassification(config(num_labels=1))
    prompts = Dataset.from_dict({"input_ids": [[2 + (row + place) % 14 for place in range(3)] for row in range(12)]})
    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(
            output_dir=folder, per_device_train_batch_size=BATCH, gradient_accumulation_steps=1, num_mini_batches=1,
            total_episodes=2 * BATCH, num_ppo_epochs=3, response_length=5, stop_token=stop_token, learning_rate=0.02,
            temperature=temperature, num_sample_generations=0, report_to="none", use_cpu=True, bf16=False,
            gradient_checkpointing=False, seed=3, save_strategy="no", **options,
        )  # fmt: skip
        PPOTrainer(arguments, tokenizer(), policy, None, reward, prompts, value, eval_dataset=prompts).train()
    ppo_trainer.masked_whiten, ppo_trainer.masked_mean = whiten, mean
    names = ("kl_coef", "gamma", "lam", "cliprange", "cliprange_value", "vf_coef")
    return {"options": {name: getattr(arguments, name) for name in names}, **seen}


def main(out: Path) -> None:
    cases = {
        "full": record(None, 1.0, kl_coef=0.1, lam=0.9, cliprange=0.1),
        "cut": record("eos", 0.7, kl_coef=0.2, missing_eos_penalty=0.5, cliprange_value=0.05),
    }
    made = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    text = json.dumps({"made_with": made | {"python": platform.python_version()}, "cases": cases})
    out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
