"""Stage sft: supervised fine-tuning of the base model on demonstrations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from tasks.core.paths import Artifacts
from tasks.core.rows import Demonstration, read_rows, write_json
from tasks.models.hf_training import HistoryCallback, train_or_resume, trainer_arguments, write_history
from tasks.models.loading import add_lora, init_process, load_reference, load_tokenizer, save_adapter
from tasks.rl.environments import tokenise_dialogue

if TYPE_CHECKING:
    from tasks.config.training import EnvironmentParams, LoraParams, SFTParams

__all__ = ["sft"]


def sft(
    params: SFTParams,
    lora: LoraParams,
    environment: EnvironmentParams | None,
    seed: int,
    artifacts: Artifacts,
) -> None:
    """Fine-tune with TRL's SFTTrainer on the responses of the demonstrations, the end token included.

    With an environment a response is a whole dialogue, and the loss is on the bot's turns, each with an end token.
    Writes adapter/, history.csv, and metrics.json with the held-out loss (nats per response token) before and after.
    """
    init_process()
    tokenizer = load_tokenizer(artifacts.base_model)
    dialogue_tokenizer = tokenizer if environment else None
    train = _dataset(artifacts.prepare / "demonstrations" / "train.jsonl", params.max_examples, dialogue_tokenizer)
    heldout = _dataset(
        artifacts.prepare / "demonstrations" / "validation.jsonl", params.max_validation_examples, dialogue_tokenizer
    )
    history = HistoryCallback("sft")
    trainer = SFTTrainer(
        model=add_lora(load_reference(artifacts.base_model, None), lora, seed=seed),
        args=SFTConfig(
            **trainer_arguments(
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
    trainer.remove_callback(PrinterCallback)
    before = trainer.evaluate()["eval_loss"]
    train_or_resume(trainer)
    after = trainer.evaluate()["eval_loss"]
    save_adapter(trainer.model, artifacts.out)
    write_history(artifacts.out / "history.csv", history.rows)
    metrics = {
        "examples": len(train),
        "heldout_loss_before": before,
        "heldout_loss": after,
        "heldout_perplexity": math.exp(after),
    }
    write_json(artifacts.out / "metrics.json", metrics)


def _dataset(path: Path, limit: int, dialogue_tokenizer: Any) -> Dataset:
    """Rows for TRL to tokenise, or dialogues tokenised here if a `dialogue_tokenizer` is given."""
    rows = read_rows(path, Demonstration)[:limit]
    if dialogue_tokenizer is not None:
        return Dataset.from_list([dict(tokenise_dialogue(row, dialogue_tokenizer)) for row in rows])
    return Dataset.from_list([{"prompt": row.prompt, "completion": row.response} for row in rows])


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("sft")
