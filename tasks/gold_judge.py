"""The gold judge: what would people rate this text? Regression on mean ratings of texts that no other stage sees."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from tasks.core.files import write_json
from tasks.core.models import add_lora, load_tokenizer, new_scorer, prepare_process, save_adapter
from tasks.core.schema import Rating, read_rows
from tasks.core.sections.gold_judge import GoldJudgeParams
from tasks.core.sections.lora import LoraParams
from tasks.core.training import HistoryCallback, common_arguments, train_or_resume, write_history
from tasks.rewards.learned import NORMALISATION, TextScorer, encode

__all__ = ["gold_judge"]


def gold_judge(
    params: GoldJudgeParams, lora: LoraParams, seed: int, *, base_model: Path, prepare: Path, out: Path
) -> None:
    """Fit a linear head on the base model to mean ratings by squared error.

    The judge starts from the base model, not from the SFT model, and reads only the gold half of the rated texts, so
    that it shares neither texts nor mistakes with the reward model. Writes adapter/, history.csv and metrics.json
    (correlation with held-out mean ratings, and the error in points).
    """
    prepare_process()
    tokenizer = load_tokenizer(base_model)
    train = read_rows(prepare / "ratings" / "gold" / "train.jsonl", Rating)[: params.max_examples]
    test = read_rows(prepare / "ratings" / "gold" / "test.jsonl", Rating)
    history = HistoryCallback("gold_judge")
    trainer = Trainer(
        model=add_lora(
            new_scorer(base_model, None, seed=seed), lora, seed=seed, head="score", first_layer=params.first_layer
        ),
        args=TrainingArguments(
            **common_arguments(
                seed=seed, batch_size=params.batch_size, learning_rate=params.learning_rate, epochs=params.epochs
            ),
            train_sampling_strategy="group_by_length",
            average_tokens_across_devices=False,  # the loss is a mean over texts; this would multiply it by the ranks
        ),
        train_dataset=_dataset(train, tokenizer, params.max_length),
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[history],
    )
    train_or_resume(trainer)
    save_adapter(trainer.model, out)
    (out / NORMALISATION).write_text(json.dumps({"max_length": params.max_length}) + "\n", encoding="utf-8")
    write_history(out / "history.csv", history.rows)
    scores = TextScorer(trainer.model, tokenizer, max_length=params.max_length)([row.text for row in test])
    ratings = torch.tensor([row.mean for row in test])
    metrics = {
        "examples": len(train),
        "heldout_texts": len(test),
        "heldout_correlation": torch.corrcoef(torch.stack([scores, ratings]))[0, 1].item(),
        "heldout_mean_absolute_error": (scores - ratings).abs().mean().item(),
    }
    write_json(out / "metrics.json", metrics)


def _dataset(rows: Sequence[Rating], tokenizer: Any, max_length: int) -> Dataset:
    return Dataset.from_list(
        [{"input_ids": encode(tokenizer, row.text, max_length), "labels": float(row.mean)} for row in rows]
    )


if __name__ == "__main__":
    from tasks.core.stage import run_stage

    run_stage("gold_judge")
