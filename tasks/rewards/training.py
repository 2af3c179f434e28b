"""Training data and trainers of reward models: on preference pairs (TRL), or on a target for each text."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import DataCollatorWithPadding, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from tasks.core.errors import DataError
from tasks.core.rows import SPLITS, Preference, Rating, read_rows
from tasks.models.early_stopping import early_stopping
from tasks.models.encoding import EncodedRow, encode_row, fit_rows, start_ids
from tasks.models.hf_training import trainer_arguments, trainer_config
from tasks.rewards.scorers import PromptResponse

if TYPE_CHECKING:
    from tasks.config.training import GoldJudgeParams, RewardModelParams

    TrainingParams: TypeAlias = RewardModelParams | GoldJudgeParams

__all__ = ["TrainingData", "load_training_data", "make_trainer"]


@dataclass(frozen=True)
class TrainingData:
    """Rows by split: pairs for kinds that compare two texts, texts and targets for kinds that rate one.

    A kind that rates texts has pairs in `test` alone, if at all. A target is a mean rating, or 1 and 0 for two classes.
    """

    pairs: Mapping[str, Sequence[Preference]] = field(default_factory=dict)
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    targets: Mapping[str, Sequence[float]] = field(default_factory=dict)
    binary: bool = False  # whether the targets are two classes
    weights: Mapping[str, float] = field(default_factory=lambda: {"": 1.0})  # of each head; one alone has the name ""
    margin_scale: float | None = None  # log-odds per point of a pair's margin; None: margins do not count
    rater_ceiling: Mapping[str, float] = field(default_factory=dict)  # bucket → agreement of one rater with the others
    encoded: Mapping[str, Sequence[EncodedRow]] = field(default_factory=dict)  # rows as token ids by split, from `fit`

    @property
    def objectives(self) -> list[str]:
        """Names of the heads, where there are several."""
        return [name for name in self.weights if name]

    def samples(self, split: str, limit: int | None = None) -> list[PromptResponse]:
        """Rated texts, then chosen and rejected responses of a split; of its first rows, about `limit`."""
        texts = [("", text) for text in self.texts.get(split, ())[:limit]]
        pairs = self.pairs.get(split, ())[: limit and limit // 2]
        return [*texts, *((row.prompt, row.chosen) for row in pairs), *((row.prompt, row.rejected) for row in pairs)]

    def fit(
        self, tokenizer: Any, params: TrainingParams, *, section: str, context: int | None
    ) -> tuple[TrainingData, dict[str, float]]:
        """Encode the training rows, keep those that fit `max_length`, and count; errors as `fit_rows`.

        For early stopping the validation rows as well.
        """
        start, fitted = len(start_ids(tokenizer)), {}
        for split in ("train", "validation") if _patience(params) else ("train",):
            if self.texts:
                rows = [encode_row(tokenizer, "", text) for text in self.texts[split]]
            else:
                rows = [encode_row(tokenizer, row.prompt, row.chosen, row.rejected) for row in self.pairs[split]]
            fitted[split] = fit_rows(rows, params, section=section, context=context, start=start)
        selected: dict[str, Any] = {
            name: {
                **splits,
                **{split: [splits[split][position] for position in rows.kept] for split, rows in fitted.items()},
            }
            for name, splits in (("pairs", self.pairs), ("texts", self.texts), ("targets", self.targets))
            if "train" in splits
        }
        encoded = {split: rows.rows for split, rows in fitted.items()}
        return replace(self, encoded=encoded, **selected), fitted["train"].metrics()

    def sizes(self) -> dict[str, float]:
        """Number of training rows."""
        if self.texts:
            return {"texts": len(self.texts["train"])}
        pairs = self.pairs["train"]
        sizes: dict[str, float] = {"pairs": len(pairs)}
        sizes |= {f"pairs/{name}": sum(row.objective == name for row in pairs) for name in self.objectives}
        if self.margin_scale is not None:
            sizes["pairs_with_margin"] = sum((row.margin or 0) > 0 for row in pairs)
            sizes["pairs_against_margin"] = sum((row.margin or 0) < 0 for row in pairs)
        return sizes


def load_training_data(params: RewardModelParams, prepare: Path, preferences: Path) -> TrainingData:
    """Load the rows that the configured kind needs.

    Raises:
        DataError: they are missing, or lack a field that the kind needs.
    """
    ceiling = _read_rater_ceiling(preferences / "ceiling.csv")
    if params.pairwise:
        pairs: dict[str, list[Preference]] = {
            split: read_rows(preferences / f"{split}.jsonl", Preference) for split in SPLITS
        }
        for split, rows in pairs.items():
            _check_objectives(rows, params.objectives or {}, preferences / f"{split}.jsonl")
        scale = params.margin_scale if params.margin == "scaled" else None
        if params.margin == "scaled" and not any((row.margin or 0) > 0 for row in pairs["train"]):
            raise DataError(
                f"reward_model.margin is scaled, but no pair of {preferences / 'train.jsonl'} has a positive margin: "
                "give pairs a `margin`, or set it to none"
            )
        return TrainingData(pairs, weights=params.objectives or {"": 1.0}, margin_scale=scale, rater_ceiling=ceiling)
    folder, heldout = prepare / "ratings" / "proxy", preferences / "test.jsonl"
    ratings = _read_ratings(folder, params.kind)
    ratings["train"] = ratings["train"][: params.max_examples]
    texts = {split: [row.text for row in rows] for split, rows in ratings.items()}
    targets = {split: [row.mean for row in rows] for split, rows in ratings.items()}
    if params.threshold is not None:
        targets = {split: [float(mean >= params.threshold) for mean in means] for split, means in targets.items()}
        if len(set(targets["train"])) == 1:
            raise DataError(
                f"reward_model.threshold {params.threshold:g} parts nothing: all {len(texts['train'])} texts of "
                f"{folder / 'train.jsonl'} are of one class; choose a rating between theirs"
            )
    test = read_rows(heldout, Preference) if heldout.is_file() and heldout.stat().st_size else []
    return TrainingData({"test": test}, texts, targets, params.threshold is not None, rater_ceiling=ceiling)


def _read_ratings(folder: Path, kind: str) -> dict[str, list[Rating]]:
    try:
        return {split: read_rows(folder / f"{split}.jsonl", Rating) for split in SPLITS}
    except DataError as error:
        raise DataError(
            f"reward_model.kind {kind} learns from rated texts: {error}; let a source of collect.sources give "
            "`ratings`, or set kind to preference"
        ) from error


def _check_objectives(rows: Sequence[Preference], known: Mapping[str, float], path: Path) -> None:
    for row in rows if known else ():
        if row.objective not in known:
            raise DataError(
                f"{path}: pair {row.id!r} is about objective {row.objective!r}; reward_model.objectives knows "
                f"{', '.join(known)}; set `objective` at its source in collect.sources"
            )
    if missing := [name for name in known if not any(row.objective == name for row in rows)]:
        raise DataError(
            f"{path} has no pair about {', '.join(missing)}: collect some, raise the number of pairs in preferences, "
            "or remove it from reward_model.objectives"
        )


def _read_rater_ceiling(path: Path) -> dict[str, float]:
    with path.open(encoding="utf-8", newline="") as file:
        return {row["bucket"]: float(row["agreement"]) for row in csv.DictReader(file) if row["agreement"]}


def make_trainer(
    params: TrainingParams,
    model: PeftModel | PreTrainedModel,
    tokenizer: Any,
    data: TrainingData,
    *,
    seed: int,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """Trainer on pairs, by Bradley–Terry: P(chosen ≻ rejected) = σ(r(chosen) − r(rejected)); or on targets of texts.

    A pair's margin, times `data.margin_scale`, is taken off the difference. Where there are several objectives, a pair
    trains the head of its own. To targets one head is fitted by squared error, or its log-odds to binary ones by
    cross-entropy.
    """
    trainer_class: type[Trainer] = Trainer
    stopping, stoppers = early_stopping(_patience(params))
    # batches of similar length pad less
    arguments = trainer_arguments(params, seed=seed) | {"train_sampling_strategy": "group_by_length"} | stopping
    options: dict[str, Any] = {}
    if data.texts:
        # A loss with a sigmoid for each output is what transformers calls by this name; here there is one output.
        model.config.problem_type = "multi_label_classification" if data.binary else "regression"
        arguments["average_tokens_across_devices"] = False  # the loss is a mean over texts; it would grow by the ranks
        options["data_collator"] = DataCollatorWithPadding(tokenizer)
    else:
        trainer_class, options["processing_class"] = RewardTrainer, tokenizer
        arguments |= {"max_length": None, "remove_unused_columns": False}  # the rows fit; TRL would drop `length`
    if data.objectives:
        # TRL refuses a model with several labels; the configuration shows one, and the layer keeps all.
        trainer_class, model.config.num_labels = ObjectivesTrainer, 1
        collate = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)
        options["data_collator"] = partial(_collate_with_heads, collate)
    datasets = {split: Dataset.from_list(_columns(data, split)) for split in data.encoded}
    config: type[TrainingArguments] = TrainingArguments if data.texts else RewardConfig
    return trainer_class(
        model=model,
        args=trainer_config(config, params, _section(params), **arguments),
        train_dataset=datasets["train"],
        eval_dataset=datasets.get("validation"),
        callbacks=[*callbacks, *stoppers],
        **options,
    )


def _columns(data: TrainingData, split: str) -> list[dict[str, Any]]:
    if not data.texts:
        return [_pair_columns(*row, data) for row in zip(data.pairs[split], data.encoded[split], strict=True)]
    return [
        {"input_ids": row.prompt + row.responses[0], "labels": [target] if data.binary else target}
        for row, target in zip(data.encoded[split], data.targets[split], strict=True)
    ]


def _pair_columns(row: Preference, encoded: EncodedRow, data: TrainingData) -> dict[str, Any]:
    chosen, rejected = (encoded.prompt + response for response in encoded.responses)
    pair: dict[str, Any] = {"chosen_ids": chosen, "rejected_ids": rejected, "length": encoded.length}
    if data.margin_scale is not None:
        # Without a margin, or with one that contradicts the label, the margin is 0.
        pair["margin"] = data.margin_scale * max(row.margin or 0.0, 0.0)
    if data.objectives:
        pair["objective"] = data.objectives.index(str(row.objective))
    return pair


def _collate_with_heads(collate: DataCollatorForPreference, examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate a batch of pairs, with the index of each pair's head, [B]."""
    return {**collate(examples), "objective": torch.tensor([example["objective"] for example in examples])}


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


def _patience(params: TrainingParams) -> int | None:
    """Evaluations without a lower loss that end training; the gold judge has no held-out texts to stop on."""
    patience: int | None = getattr(params, "early_stopping_patience", None)
    return patience


def _section(params: TrainingParams) -> str:
    return "reward_model" if hasattr(params, "early_stopping_patience") else "gold_judge"
