"""Stage dpo: DPO and its kin, by TRL, on the pairs that train the reward model: the baseline without one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import Trainer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.import_utils import TRLExperimentalWarning

from tasks.core.paths import Artifacts
from tasks.core.rows import Preference, read_rows, write_json
from tasks.models.encoding import encode_row, fit_rows, start_ids
from tasks.models.hf_training import HistoryCallback, train_or_resume, trainer_arguments, trainer_config, write_history
from tasks.models.loading import (
    init_process,
    load_beside,
    load_context,
    load_reference,
    load_tokenizer,
    lora_config,
    make_trainable,
    save_weights,
)

if TYPE_CHECKING:
    from tasks.config.training import DPOParams, LoraParams

__all__ = ["dpo"]

REFERENCE_FREE = ("orpo", "simpo")


def dpo(params: DPOParams, lora: LoraParams | None, policy_seed: int, artifacts: Artifacts) -> None:
    """Train the policy with TRL's trainer of the loss type, the SFT policy as reference where there is one.

    Pairs without a shared prompt get the start token as theirs, or the end token where there is none. Writes adapter/,
    history.csv and metrics.json.
    """
    init_process()
    tokenizer = load_tokenizer(artifacts.base_model)
    train = read_rows(artifacts.preferences / "train.jsonl", Preference)[: params.max_pairs]
    history = HistoryCallback("dpo")
    torch.manual_seed(policy_seed)
    rows, counts = _fit_pairs(params, train, tokenizer, load_context(artifacts.base_model))
    model: Any = load_reference(artifacts.base_model, artifacts.sft)
    options: dict[str, Any] = {}
    if lora:
        options["peft_config"] = lora_config(model, lora)
    else:
        model = make_trainable(model, None, seed=policy_seed)
        if params.loss_type not in REFERENCE_FREE:
            options["ref_model"] = load_beside(artifacts.base_model, artifacts.sft, model)
    trainer = make_trainer(
        params, policy_seed, rows, model=model, processing_class=tokenizer, callbacks=[history], **options
    )
    train_or_resume(trainer)
    save_weights(trainer.model, artifacts.out)
    write_history(artifacts.out / "history.csv", history.rows)
    last = {key: value for key, value in history.rows[-1].items() if key != "step"}
    write_json(artifacts.out / "metrics.json", {"pairs": len(rows), **counts, **last})


def make_trainer(params: DPOParams, seed: int, rows: Dataset, **common: Any) -> Trainer:
    """TRL's trainer of the loss type, for pairs that are token ids; ConfigError as `trainer_config`.

    Args:
        common: model, adapter or reference, tokenizer and callbacks, which all trainers take.
    """
    arguments = {**trainer_arguments(params, seed=seed), "beta": params.beta, "max_length": None}  # the rows fit
    if params.loss_type == "kto":
        arguments |= {"loss_type": "kto", "train_sampling_strategy": "sequential"}
        config = trainer_config(KTOConfig, params, "dpo", **arguments)
        return EncodedKTOTrainer(args=config, train_dataset=unpaired(rows, seed, params.batch_size), **common)
    if params.loss_type in REFERENCE_FREE:
        return _reference_free_trainer(params, arguments, train_dataset=rows, **common)
    if params.loss_type == "robust":
        arguments["label_smoothing"] = params.label_smoothing
    config = trainer_config(DPOConfig, params, "dpo", **arguments, loss_type=[params.loss_type])
    return EncodedDPOTrainer(args=config, train_dataset=rows, **common)


def _reference_free_trainer(params: DPOParams, arguments: dict[str, Any], **common: Any) -> Trainer:
    """ORPO (Hong et al. 2024, arXiv 2403.07691) or SimPO (Meng et al. 2024, arXiv 2405.14734)."""
    with warnings.catch_warnings():  # TRL says that they may change; the version is pinned
        warnings.simplefilter("ignore", TRLExperimentalWarning)
        from trl.experimental.cpo import CPOConfig, CPOTrainer
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    kind: Any = ORPOTrainer if params.loss_type == "orpo" else CPOTrainer
    trainer_class = type(f"Encoded{kind.__name__}", (kind,), {"tokenize_row": staticmethod(_tokenised)})
    rows = common["train_dataset"]
    longest = max(map(len, rows["prompt_ids"])) + max(map(len, [*rows["chosen_ids"], *rows["rejected_ids"]]))
    arguments |= {"max_length": longest, "remove_unused_columns": False}
    if params.loss_type == "simpo":
        arguments |= {"loss_type": "simpo", "cpo_alpha": 0.0, "label_smoothing": params.label_smoothing}
    config: Any = ORPOConfig if params.loss_type == "orpo" else CPOConfig
    trainer: Trainer = trainer_class(args=trainer_config(config, params, "dpo", **arguments), **common)
    return trainer


def _tokenised(row: dict[str, Any]) -> dict[str, list[int]]:
    """The columns that the collator of TRL's ORPO and CPO trainers reads; -100: no label."""
    columns = {}
    for side in ("chosen", "rejected"):
        prompt, response = row["prompt_ids"], row[f"{side}_ids"]
        columns[f"{side}_input_ids"] = prompt + response
        columns[f"{side}_attention_mask"] = [1] * len(prompt + response)
        columns[f"{side}_labels"] = [-100] * len(prompt) + response
    return columns


def unpaired(pairs: Dataset, seed: int, batch_size: int) -> Dataset:
    """Both responses of each pair as rows of their own for KTO, in random order.

    In each batch a prompt gets the response of the row before as well, from which KTO estimates its KL: TRL's way, for
    token ids (Ethayarajh et al. 2024, arXiv 2402.01306).
    """
    rows: list[dict[str, Any]] = [
        {"prompt_ids": pair["prompt_ids"], "completion_ids": pair[f"{side}_ids"], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    for start in range(0, len(order), batch_size):
        batch = [rows[row] for row in order[start : start + batch_size]]
        for row, before in zip(batch, [batch[-1], *batch[:-1]], strict=True):
            row["KL_completion_ids"] = before["completion_ids"]
    return Dataset.from_list([rows[row] for row in order])


class EncodedDPOTrainer(DPOTrainer):
    """TRL's trainer for pairs that are token ids already."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


class EncodedKTOTrainer(KTOTrainer):
    """TRL's trainer for responses that are token ids already."""

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
