"""Stage dpo: DPO by TRL on the pairs that train the reward model, as the baseline without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import TaskType
from trl import DPOConfig, DPOTrainer

from tasks.core.paths import Artifacts
from tasks.core.rows import Preference, read_rows, write_json
from tasks.models.hf_training import HistoryCallback, train_or_resume, trainer_arguments, write_history
from tasks.models.loading import init_process, load_reference, load_tokenizer, lora_config, save_adapter

if TYPE_CHECKING:
    from tasks.config.training import DPOParams, LoraParams

__all__ = ["dpo"]


def dpo(params: DPOParams, lora: LoraParams, policy_seed: int, artifacts: Artifacts) -> None:
    """Train the policy with TRL's DPOTrainer, the SFT policy as reference.

    Pairs without a shared prompt get the start-of-text token as theirs. Writes adapter/, history.csv and metrics.json.
    """
    init_process()
    tokenizer = load_tokenizer(artifacts.base_model)
    train = read_rows(artifacts.preferences / "train.jsonl", Preference)[: params.max_pairs]
    history = HistoryCallback("dpo")
    torch.manual_seed(policy_seed)
    trainer = DPOTrainer(
        model=load_reference(artifacts.base_model, artifacts.sft),
        peft_config=lora_config(lora, TaskType.CAUSAL_LM),
        args=DPOConfig(
            **trainer_arguments(
                seed=policy_seed, batch_size=params.batch_size, learning_rate=params.learning_rate, epochs=params.epochs
            ),
            beta=params.beta,
            max_length=params.max_length,
        ),
        train_dataset=_dataset(train, tokenizer),
        processing_class=tokenizer,
        callbacks=[history],
    )
    train_or_resume(trainer)
    save_adapter(trainer.model, artifacts.out)
    write_history(artifacts.out / "history.csv", history.rows)
    metrics = {"pairs": len(train), **{key: value for key, value in history.rows[-1].items() if key != "step"}}
    write_json(artifacts.out / "metrics.json", metrics)


def _dataset(rows: Sequence[Preference], tokenizer: Any) -> Dataset:
    start = tokenizer.bos_token or tokenizer.eos_token
    return Dataset.from_list(
        [{"prompt": row.prompt or start, "chosen": row.chosen, "rejected": row.rejected} for row in rows]
    )


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("dpo")
