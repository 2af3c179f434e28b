"""Stage dpo: DPO by TRL on the pairs that train the reward model, as the baseline without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from tasks.core.paths import Artifacts
from tasks.core.rows import Preference, read_rows, write_json
from tasks.models.encoding import encode_row, fit_rows, start_ids
from tasks.models.hf_training import HistoryCallback, train_or_resume, trainer_arguments, write_history
from tasks.models.loading import (
    init_process,
    load_context,
    load_reference,
    load_tokenizer,
    lora_config,
    save_adapter,
)

if TYPE_CHECKING:
    from tasks.config.training import DPOParams, LoraParams

__all__ = ["dpo"]


def dpo(params: DPOParams, lora: LoraParams, policy_seed: int, artifacts: Artifacts) -> None:
    """Train the policy with TRL's DPOTrainer, the SFT policy as reference.

    Pairs without a shared prompt get the start token as theirs, or the end token where there is none. Writes adapter/,
    history.csv and metrics.json.
    """
    init_process()
    tokenizer = load_tokenizer(artifacts.base_model)
    train = read_rows(artifacts.preferences / "train.jsonl", Preference)[: params.max_pairs]
    history = HistoryCallback("dpo")
    torch.manual_seed(policy_seed)
    rows, counts = _fit_pairs(params, train, tokenizer, load_context(artifacts.base_model))
    model = load_reference(artifacts.base_model, artifacts.sft)
    trainer = EncodedDPOTrainer(
        model=model,
        peft_config=lora_config(model, lora),
        args=DPOConfig(
            **trainer_arguments(
                seed=policy_seed, batch_size=params.batch_size, learning_rate=params.learning_rate, epochs=params.epochs
            ),
            beta=params.beta,
            max_length=None,  # the rows fit
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[history],
    )
    train_or_resume(trainer)
    save_adapter(trainer.model, artifacts.out)
    write_history(artifacts.out / "history.csv", history.rows)
    last = {key: value for key, value in history.rows[-1].items() if key != "step"}
    write_json(artifacts.out / "metrics.json", {"pairs": len(rows), **counts, **last})


class EncodedDPOTrainer(DPOTrainer):
    """TRL's trainer for pairs that are token ids already."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


def _fit_pairs(
    params: DPOParams, pairs: Sequence[Preference], tokenizer: Any, context: int | None
) -> tuple[Dataset, dict[str, float]]:
    """Pairs that fit `max_length`, and their counts; raises as `fit_rows`."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    encoded = [encode_row(tokenizer, row.prompt, row.chosen, row.rejected) for row in pairs]
    encoded = [row if row.prompt else replace(row, prompt=[start]) for row in encoded]
    fitted = fit_rows(encoded, params, section="dpo", context=context, start=len(start_ids(tokenizer)))
    columns = [
        {"prompt_ids": row.prompt, "chosen_ids": row.responses[0], "rejected_ids": row.responses[1]}
        for row in fitted.rows
    ]
    return Dataset.from_list(columns), fitted.metrics()


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("dpo")
