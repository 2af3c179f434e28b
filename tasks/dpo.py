"""DPO by TRL on the same human pairs that train the reward model: the baseline without a reward model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import TaskType
from trl import DPOConfig, DPOTrainer

from tasks.core.files import write_json
from tasks.core.models import load_reference, load_tokenizer, lora_config, prepare_process, save_adapter
from tasks.core.schema import Preference, read_rows
from tasks.core.sections.dpo import DPOParams
from tasks.core.sections.lora import LoraParams
from tasks.core.training import HistoryCallback, common_arguments, train_or_resume, write_history

__all__ = ["dpo"]


def dpo(
    params: DPOParams, lora: LoraParams, policy_seed: int, *, base_model: Path, sft: Path, preferences: Path, out: Path
) -> None:
    """Train the policy with TRL's DPOTrainer, the SFT policy as reference.

    Pairs without a shared prompt get the start-of-text token as theirs. Writes adapter/, history.csv and metrics.json.
    """
    prepare_process()
    tokenizer = load_tokenizer(base_model)
    train = read_rows(preferences / "train.jsonl", Preference)[: params.max_pairs]
    history = HistoryCallback("dpo")
    torch.manual_seed(policy_seed)
    trainer = DPOTrainer(
        model=load_reference(base_model, sft),
        peft_config=lora_config(lora, TaskType.CAUSAL_LM),
        args=DPOConfig(
            **common_arguments(
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
    save_adapter(trainer.model, out)
    write_history(out / "history.csv", history.rows)
    metrics = {"pairs": len(train), **{key: value for key, value in history.rows[-1].items() if key != "step"}}
    write_json(out / "metrics.json", metrics)


def _dataset(rows: Sequence[Preference], tokenizer: Any) -> Dataset:
    start = tokenizer.bos_token or tokenizer.eos_token
    return Dataset.from_list(
        [{"prompt": row.prompt or start, "chosen": row.chosen, "rejected": row.rejected} for row in rows]
    )


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("dpo")
