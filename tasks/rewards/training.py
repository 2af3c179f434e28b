"""Trainers of reward models: on preference pairs (TRL), or on a target for each text."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from tasks.core.rows import Preference
from tasks.models.hf_training import trainer_arguments
from tasks.rewards.scorers import encode
from tasks.rewards.training_data import TrainingData

__all__ = ["TrainingConfig", "classification_trainer", "pair_trainer", "regression_trainer"]


class TrainingConfig(Protocol):
    """Training parameters that the sections reward_model and gold_judge share."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def max_length(self) -> int: ...


def pair_trainer(
    config: TrainingConfig,
    model: PeftModel,
    tokenizer: Any,
    data: TrainingData,
    *,
    seed: int,
    callbacks: list[TrainerCallback],
) -> RewardTrainer:
    """Bradley–Terry: P(chosen ≻ rejected) = σ(r(chosen) − r(rejected)).

    A pair's margin, times `data.margin_scale`, is taken off the difference. Where there are several objectives, a pair
    trains the head of its own.
    """
    trainer_class, collator = RewardTrainer, None
    if data.objectives:
        # TRL refuses a model with several labels; the configuration shows one, and the layer keeps all.
        model.config.num_labels = 1
        trainer_class, collator = ObjectivesTrainer, ObjectivesCollator(pad_token_id=tokenizer.pad_token_id)
    rows = [_encode_pair(row, tokenizer, config.max_length, data) for row in data.pairs["train"]]
    return trainer_class(
        model=model,
        args=RewardConfig(
            **_common_arguments(config, seed),
            max_length=config.max_length,
            remove_unused_columns=False,  # TRL would drop the column `length`
        ),
        data_collator=collator,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def _encode_pair(row: Preference, tokenizer: Any, max_length: int, data: TrainingData) -> dict[str, Any]:
    chosen = encode(tokenizer, row.prompt + row.chosen, max_length)
    rejected = encode(tokenizer, row.prompt + row.rejected, max_length)
    pair: dict[str, Any] = {"chosen_ids": chosen, "rejected_ids": rejected, "length": max(len(chosen), len(rejected))}
    if data.margin_scale is not None:
        # Without a margin, or with one that contradicts the label, the margin is 0.
        pair["margin"] = data.margin_scale * max(row.margin or 0.0, 0.0)
    if data.objectives:
        pair["objective"] = data.objectives.index(str(row.objective))
    return pair


class ObjectivesCollator(DataCollatorForPreference):
    """TRL's collator, with the index of each pair's head, [B]."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate a batch of pairs."""
        heads = torch.tensor([example["objective"] for example in examples])
        return {**super().torch_call(examples), "objective": heads}


class ObjectivesTrainer(RewardTrainer):
    """TRL's loss on the head of each pair's objective; the backbone is shared."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Call TRL's loss with a model that returns one score a text."""
        heads = inputs.pop("objective")

        def select_head(**batch: Any) -> Any:
            outputs = model(**batch)
            outputs.logits = outputs.logits.gather(1, torch.cat([heads, heads])[:, None])
            return outputs

        return super().compute_loss(select_head, inputs, *args, **kwargs)


def regression_trainer(
    config: TrainingConfig,
    model: PeftModel,
    tokenizer: Any,
    data: TrainingData,
    *,
    seed: int,
    callbacks: list[TrainerCallback],
    binary: bool = False,
) -> Trainer:
    """Fit one head to the targets of the texts by squared error, or its log-odds to binary ones by cross-entropy."""
    # A loss with a sigmoid for each output is what transformers calls by this name; here there is one output.
    model.config.problem_type = "multi_label_classification" if binary else "regression"
    texts = [encode(tokenizer, text, config.max_length) for text in data.texts["train"]]
    targets = [[target] if binary else target for target in data.targets["train"]]
    rows = [{"input_ids": ids, "labels": target} for ids, target in zip(texts, targets, strict=True)]
    return Trainer(
        model=model,
        args=TrainingArguments(
            **_common_arguments(config, seed),
            average_tokens_across_devices=False,  # the loss is a mean over texts; this would multiply it by the ranks
        ),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=callbacks,
    )


classification_trainer = partial(regression_trainer, binary=True)


def _common_arguments(config: TrainingConfig, seed: int) -> dict[str, Any]:
    arguments = trainer_arguments(
        seed=seed, batch_size=config.batch_size, learning_rate=config.learning_rate, epochs=config.epochs
    )
    return arguments | {"train_sampling_strategy": "group_by_length"}  # batches of similar length pad less
