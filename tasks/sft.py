"""Supervised fine-tuning: the base model learns to write like the demonstrations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from tasks.core.files import write_json
from tasks.core.models import add_lora, load_reference, load_tokenizer, prepare_process, save_adapter
from tasks.core.schema import Demonstration, read_rows
from tasks.core.sections.environment import EnvironmentParams
from tasks.core.sections.lora import LoraParams
from tasks.core.sections.sft import SFTParams
from tasks.core.training import HistoryCallback, calm, common_arguments, train_or_resume, write_history
from tasks.rl.environments.dialogue import tokenised

__all__ = ["sft"]


def sft(
    params: SFTParams,
    lora: LoraParams,
    environment: EnvironmentParams | None,
    seed: int,
    *,
    base_model: Path,
    prepare: Path,
    out: Path,
) -> None:
    """Fine-tune with TRL's SFTTrainer on the responses of the demonstrations, the end token included.

    With an environment a response is a whole dialogue, and what is learned is the bot's turns, each with an end token.
    Writes adapter/, history.csv, and metrics.json with the held-out loss (nats per response token) before and after.
    """
    prepare_process()
    tokenizer = load_tokenizer(base_model)
    dialogues = tokenizer if environment else None
    train = _dataset(prepare / "demonstrations" / "train.jsonl", params.max_examples, dialogues)
    heldout = _dataset(prepare / "demonstrations" / "validation.jsonl", params.max_validation_examples, dialogues)
    history = HistoryCallback("sft")
    trainer = SFTTrainer(
        model=add_lora(load_reference(base_model, None), lora, seed=seed),
        args=SFTConfig(
            **common_arguments(
                seed=seed, batch_size=params.batch_size, learning_rate=params.learning_rate, epochs=params.epochs
            ),
            max_length=params.max_length,
            completion_only_loss=True,
            train_sampling_strategy="group_by_length",
        ),
        train_dataset=train,
        eval_dataset=heldout,
        processing_class=tokenizer,
        callbacks=[history],
    )
    before = calm(trainer).evaluate()["eval_loss"]
    train_or_resume(trainer)
    after = trainer.evaluate()["eval_loss"]
    save_adapter(trainer.model, out)
    write_history(out / "history.csv", history.rows)
    metrics = {
        "examples": len(train),
        "heldout_loss_before": before,
        "heldout_loss": after,
        "heldout_perplexity": math.exp(after),
    }
    write_json(out / "metrics.json", metrics)


def _dataset(path: Path, limit: int, dialogues: Any) -> Dataset:
    """The rows for TRL to tokenise, or dialogues tokenised by what is given for them."""
    rows = read_rows(path, Demonstration)[:limit]
    if dialogues is not None:
        return Dataset.from_list([dict(tokenised(row, dialogues)) for row in rows])
    return Dataset.from_list([{"prompt": row.prompt, "completion": row.response} for row in rows])


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("sft")
