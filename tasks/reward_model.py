"""The reward model: which of two texts would people prefer? Bradley–Terry over a linear head on the SFT model."""

from __future__ import annotations

import csv
import gc
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import RewardConfig, RewardTrainer

from tasks.core import tracking
from tasks.core.files import write_json, write_table
from tasks.core.models import add_lora, load_reference, load_tokenizer, new_scorer, prepare_process, save_adapter
from tasks.core.schema import Preference, Prompt, read_rows
from tasks.core.sections.generation import GenerationParams
from tasks.core.sections.lora import LoraParams
from tasks.core.sections.reward_model import RewardModelParams
from tasks.core.training import HistoryCallback, common_arguments, train_or_resume, write_history
from tasks.evals.calibration import MARGINS, accuracy_by_margin, calibration_table
from tasks.rewards.familiarity import Familiarity
from tasks.rewards.learned import FAMILIARITY, NORMALISATION, TextScorer, encode, member_folder
from tasks.rl.rollout import generate

__all__ = ["reward_model"]

SPLITS = ("train", "validation", "test")

FAMILIAR_TEXTS = 512
"""Training texts whose states are measured. On the default task a hundred find nearly what all 1,600 find: all made-up
nonsense, four fifths of shuffled sentences, and 34 instead of 30 % of SFT's responses, most of them cut short."""


def reward_model(
    params: RewardModelParams,
    lora: LoraParams,
    generation: GenerationParams,
    seed: int,
    *,
    base_model: Path,
    sft: Path,
    prepare: Path,
    preferences: Path,
    out: Path,
) -> None:
    """Fit P(chosen ≻ rejected) = σ(r(chosen) − r(rejected)) with TRL's RewardTrainer; measure it; normalise it.

    Writes adapter/ (with normalisation.json: μ and σ of the raw reward on responses of the SFT policy;
    familiarity.safetensors: where the training texts lie; and members/1, members/2, …: the further members of an
    ensemble, trained alike from the seeds that follow, each laid out like this folder), history.csv,
    accuracy_by_margin.csv, calibration.csv and metrics.json. The tables and figures are those of the first member, but
    for `ensemble_accuracy`, which is that of the members' mean, and `mean_member_accuracy`.
    """
    prepare_process()
    tokenizer = load_tokenizer(base_model)
    train, validation, test = (read_rows(preferences / f"{part}.jsonl", Preference) for part in SPLITS)
    samples = _reference_texts(params, generation, seed, base_model, sft, prepare, tokenizer)
    metrics: dict[str, float] = {"pairs": len(train)}
    scores: list[Tensor] = []
    for number in range(params.members):
        folder = member_folder(out, number)
        with tracking.part(f"member_{number}") if number else nullcontext():
            scorer = _trained(params, lora, seed + number, base_model, sft, train, tokenizer, folder, number)
        raw, states = scorer.read(samples)
        mean, std = raw.mean().item(), raw.std().item()
        write_json(folder / NORMALISATION, {"mean": mean, "std": std, "max_length": params.max_length})
        heldout, heldout_states = scorer.read(_texts(test))
        scores.append((heldout - mean) / std)
        if number == 0:
            familiarity = _familiarity(scorer, train, validation)
            familiarity.save(out / FAMILIARITY)
            metrics |= {"raw_mean": mean, "raw_std": std} | _measure(heldout, test, tokenizer, preferences, out)
            metrics |= _unfamiliar(familiarity, states, heldout_states)
        del scorer
        gc.collect()  # a trained model holds itself in reference cycles, and the next needs the room
    write_json(out / "metrics.json", metrics | _of_the_ensemble(torch.stack(scores)))


def _trained(
    params: RewardModelParams,
    lora: LoraParams,
    seed: int,
    base_model: Path,
    sft: Path,
    train: Sequence[Preference],
    tokenizer: Any,
    folder: Path,
    number: int,
) -> TextScorer:
    """Train one member, and write its adapter and its history to the folder."""
    history = HistoryCallback(f"reward_model, member {number}" if number else "reward_model")
    trainer = RewardTrainer(
        model=add_lora(
            new_scorer(base_model, sft, seed=seed), lora, seed=seed, head="score", first_layer=params.first_layer
        ),
        args=RewardConfig(
            **common_arguments(
                seed=seed, batch_size=params.batch_size, learning_rate=params.learning_rate, epochs=params.epochs
            ),
            max_length=params.max_length,
            # Batches of like length waste less on padding; TRL drops the column that says so unless told not to.
            train_sampling_strategy="group_by_length",
            remove_unused_columns=False,
        ),
        train_dataset=Dataset.from_list([_encoded(row, tokenizer, params.max_length) for row in train]),
        processing_class=tokenizer,
        callbacks=[history],
    )
    train_or_resume(trainer)
    save_adapter(trainer.model, folder)
    write_history(folder / "history.csv", history.rows)
    return TextScorer(trainer.model, tokenizer, max_length=params.max_length)


def _encoded(row: Preference, tokenizer: Any, max_length: int) -> dict[str, Any]:
    chosen = encode(tokenizer, row.prompt + row.chosen, max_length)
    rejected = encode(tokenizer, row.prompt + row.rejected, max_length)
    return {"chosen_ids": chosen, "rejected_ids": rejected, "length": max(len(chosen), len(rejected))}


def _reference_texts(
    params: RewardModelParams,
    generation: GenerationParams,
    seed: int,
    base_model: Path,
    sft: Path,
    prepare: Path,
    tokenizer: Any,
) -> list[str]:
    """Texts that the SFT policy writes for training prompts."""
    prompts = [row.prompt for row in read_rows(prepare / "prompts" / "train.jsonl", Prompt)]
    prompts = (prompts * (params.normalisation_samples // len(prompts) + 1))[: params.normalisation_samples]
    rollout = generate(
        load_reference(base_model, sft),
        [tokenizer(prompt).input_ids for prompt in prompts],
        max_new_tokens=generation.max_new_tokens,
        temperature=generation.temperature,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        generator=torch.Generator().manual_seed(seed),
    )
    return [
        prompt + tokenizer.decode(ids, skip_special_tokens=True)
        for prompt, ids in zip(prompts, rollout.response_ids(), strict=True)
    ]


def _texts(pairs: Sequence[Preference]) -> list[str]:
    """The chosen texts, then the rejected ones."""
    return [row.prompt + row.chosen for row in pairs] + [row.prompt + row.rejected for row in pairs]


def _familiarity(scorer: TextScorer, train: Sequence[Preference], validation: Sequence[Preference]) -> Familiarity:
    texts = _texts(train[: FAMILIAR_TEXTS // 2])
    return Familiarity.fit(*(scorer.read(list(dict.fromkeys(own)))[1] for own in (texts, _texts(validation))))


def _unfamiliar(familiarity: Familiarity, samples: Tensor, heldout: Tensor) -> dict[str, float]:
    """The threshold, and the shares beyond it of the SFT policy's responses and of held-out texts of people."""
    return {
        "familiar_distance": familiarity.threshold,
        "unfamiliar_sft": familiarity.unfamiliar(samples).mean().item(),
        "unfamiliar_heldout": familiarity.unfamiliar(heldout).mean().item(),
    }


def _of_the_ensemble(scores: Tensor) -> dict[str, float]:
    """How often members [K, chosen and rejected] order a pair rightly, together and each alone; nothing of one."""
    if len(scores) == 1:
        return {}
    half = scores.shape[1] // 2
    right = scores[:, :half] > scores[:, half:]
    together = scores.mean(0)[:half] > scores.mean(0)[half:]
    return {
        "members": len(scores),
        "ensemble_accuracy": _share(together),
        "mean_member_accuracy": _share(right),
    }


def _measure(
    scores: Tensor, pairs: Sequence[Preference], tokenizer: Any, preferences: Path, out: Path
) -> dict[str, float]:
    """Accuracy on held-out human pairs by rating margin beside the raters' own, calibration, and length bias.

    Args:
        scores: raw ones of `_texts(pairs)`.
    """
    gaps = scores[: len(pairs)] - scores[len(pairs) :]
    margins = torch.tensor([float("nan") if row.margin is None else row.margin for row in pairs])
    write_table(out / "accuracy_by_margin.csv", accuracy_by_margin(gaps, margins, _ceiling(preferences)))
    table, calibration_error = calibration_table(gaps)
    write_table(out / "calibration.csv", table)
    lengths = torch.tensor([float(len(tokenizer(text).input_ids)) for text in _texts(pairs)])
    wide = margins.abs() >= MARGINS.clear
    return {
        "heldout_pairs": len(pairs),
        "accuracy": _share(gaps > 0),
        "accuracy_margin_1": _share(gaps[wide] > 0),
        "pairs_margin_1": int(wide.sum()),
        "calibration_error": calibration_error,
        "length_correlation": torch.corrcoef(torch.stack([scores, lengths]))[0, 1].item(),
    }


def _share(hits: Tensor) -> float:
    return hits.float().mean().item() if hits.numel() else 0.0


def _ceiling(preferences: Path) -> dict[str, float]:
    """Margin bucket → how often one person's ratings order a pair as the mean of the others does."""
    path = preferences / "ceiling.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return {row["bucket"]: float(row["agreement"]) for row in csv.DictReader(file) if row["agreement"]}


if __name__ == "__main__":
    from tasks.core.stage import run_stage

    run_stage("reward_model")
