"""Stage sft: supervised fine-tuning of the base model on demonstrations."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from tasks.core.paths import Artifacts
from tasks.core.rows import Demonstration, read_rows, write_json
from tasks.models.early_stopping import early_stopping
from tasks.models.encoding import encode_row, fit_rows, start_ids
from tasks.models.hf_training import HistoryCallback, train_or_resume, trainer_arguments, trainer_config, write_history
from tasks.models.loading import (
    init_process,
    load_context,
    load_reference,
    load_tokenizer,
    make_trainable,
    save_weights,
)
from tasks.rl.environments import encode_dialogue

if TYPE_CHECKING:
    from tasks.config.training import EnvironmentParams, LoraParams, SFTParams

__all__ = ["sft"]


def sft(
    params: SFTParams, lora: LoraParams | None, environment: EnvironmentParams | None, seed: int, artifacts: Artifacts
) -> None:
    """Fine-tune with TRL's SFTTrainer on the responses of the demonstrations, the end token included.

    With an environment a response is a whole dialogue, and the loss is on the bot's turns, each with an end token.
    Writes adapter/, history.csv, and metrics.json with the held-out loss (nats per response token) before and after.
    """
    init_process()
    tokenizer = load_tokenizer(artifacts.base_model)
    build = partial(
        _dataset, params, tokenizer, context=load_context(artifacts.base_model), dialogues=environment is not None
    )
    demonstrations = artifacts.prepare / "demonstrations"
    train, counts = build(demonstrations / "train.jsonl", params.max_examples)
    heldout, heldout_counts = build(demonstrations / "validation.jsonl", params.max_validation_examples)
    history = HistoryCallback("sft")
    stopping, stoppers = early_stopping(params.early_stopping_patience)
    trainer = SFTTrainer(
        model=make_trainable(load_reference(artifacts.base_model, None), lora, seed=seed),
        args=trainer_config(
            SFTConfig,
            params,
            "sft",
            **trainer_arguments(params, seed=seed),
            **stopping,
            max_length=None,  # the rows fit
            completion_only_loss=True,
            train_sampling_strategy="group_by_length",
        ),
        train_dataset=train,
        eval_dataset=heldout,
        processing_class=tokenizer,
        callbacks=[history, *stoppers],
    )
    trainer.remove_callback(PrinterCallback)
    before = trainer.evaluate()["eval_loss"]
    train_or_resume(trainer)
    after = trainer.evaluate()["eval_loss"]
    save_weights(trainer.model, artifacts.out)
    write_history(artifacts.out / "history.csv", history.rows)
    metrics = {
        "examples": len(train),
        "heldout_loss_before": before,
        "heldout_loss": after,
        "heldout_perplexity": math.exp(after),
        **counts,
        "heldout_rows/kept": heldout_counts["rows/kept"],
    }
    write_json(artifacts.out / "metrics.json", metrics)


def _dataset(
    params: SFTParams, tokenizer: Any, path: Path, limit: int, *, context: int | None, dialogues: bool
) -> tuple[Dataset, dict[str, float]]:
    """Rows that fit `max_length`, as TRL's trainer takes tokenised ones, and their counts; raises as `fit_rows`."""
    rows = read_rows(path, Demonstration)[:limit]
    if dialogues:
        encoded, masks = zip(*(encode_dialogue(row, tokenizer) for row in rows), strict=True)
    else:
        encoded = tuple(encode_row(tokenizer, row.prompt, row.response) for row in rows)
        masks = tuple([1] * len(row.responses[0]) for row in encoded)
    fitted = fit_rows(encoded, params, section="sft", context=context, start=len(start_ids(tokenizer)))
    columns = [
        {"input_ids": row.prompt + row.responses[0], "completion_mask": [0] * len(row.prompt) + masks[position]}
        for position, row in zip(fitted.kept, fitted.rows, strict=True)
    ]
    return Dataset.from_list(columns), fitted.metrics()


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("sft")
