"""Stage reward_model: train a linear head on a language model, or take a pretrained reward model."""

from __future__ import annotations

import gc
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tasks.core import tracking
from tasks.core.paths import Artifacts
from tasks.core.rows import Prompt, read_rows, write_json
from tasks.evals.challenge import challenge_samples, load_challenge, write_challenge
from tasks.models.hf_training import HistoryCallback, train_or_resume, write_history
from tasks.models.loading import (
    ADAPTER_DIR,
    init_process,
    load_context,
    load_reference,
    load_tokenizer,
    make_trainable,
    new_reward_model,
    save_weights,
)
from tasks.rewards.objectives import check_accuracy, ensemble_metrics, evaluate_reward_model
from tasks.rewards.reward_model import (
    FIT_TEXTS,
    NORMALISATION,
    OOD_DETECTOR,
    EnsembleMember,
    backbone_of,
    fit_ood_detector,
    member_folder,
)
from tasks.rewards.scorers import (
    PromptResponse,
    TextScorer,
    fetch_backbone,
    fetch_pretrained_scorer,
    load_pretrained_scorer,
)
from tasks.rewards.training import TrainingData, load_training_data, make_trainer
from tasks.rl.rollout import LocalSampler

if TYPE_CHECKING:
    from tasks.config.training import GenerationParams, LoraParams, RewardModelParams

__all__ = ["reward_model"]


def reward_model(
    params: RewardModelParams, lora: LoraParams | None, generation: GenerationParams, seed: int, artifacts: Artifacts
) -> None:
    """Train a reward model, or load a pretrained one; normalise and evaluate it.

    Writes adapter/ (with normalisation.json: μ and σ of each head's raw value on responses of the SFT policy;
    ood.safetensors: where the training texts lie; members/1, members/2, …: the further members of an ensemble, trained
    alike from the seeds that follow, each laid out like this folder; backbone/ or scorer/: a copy of the model that is
    not the SFT model), history.csv, accuracy_by_margin.csv, calibration.csv, challenge.csv (pairs made by rule, see
    `tasks.evals.challenge`) and metrics.json. The tables and metrics are those of the first member, but for those of
    the members' mean, `ensemble_…` and `challenge…`, and for `mean_member_…`.

    Raises:
        DataError: the rows that this kind learns from are missing, or lack a field.
        ModelError: a model is incomplete, or of an unfit architecture.
        SourceError: a backbone or pretrained model could not be fetched.
        TrainingError: held-out accuracy is no better than chance.
    """
    init_process()
    shutil.rmtree(artifacts.out / ADAPTER_DIR, ignore_errors=True)
    data = load_training_data(params, artifacts.prepare, artifacts.preferences)
    samples = _sample_sft_responses(params, generation, seed, artifacts.base_model, artifacts.sft, artifacts.prepare)
    if params.backbone:
        fetch_backbone(params.backbone, seed, artifacts.out)
    backbone, _ = backbone_of(artifacts.base_model, artifacts.sft, artifacts.out)
    counts: dict[str, float] = {}
    if not params.pretrained:
        data, counts = data.fit(
            load_tokenizer(backbone), params, section="reward_model", context=load_context(backbone)
        )
    ratings, pairs = artifacts.prepare / "ratings" / "proxy" / "test.jsonl", artifacts.preferences / "test.jsonl"
    made = load_challenge(ratings, pairs, seed)
    metrics, scores, made_scores = data.sizes() | counts, [], []
    for number in range(params.ensemble_size):
        folder = member_folder(artifacts.out, number)
        scorer = train_reward_model(params, lora, seed, data, artifacts, number)
        member, sample_states = EnsembleMember.fit(scorer, samples, data.weights, length_debias=params.length_debias)
        write_json(folder / NORMALISATION, member.to_dict())
        values, states = member.raw_scores(data.samples("test"))
        scores.append(member.normalise(values))
        if made:
            made_scores.append(member.score(member.normalise(member.raw_scores(challenge_samples(made))[0])))
        if number == 0:
            metrics |= evaluate_reward_model(params.kind, data, member, values, artifacts.out)
            ood = fit_ood_detector(scorer, data.samples("train", FIT_TEXTS), data.samples("validation"))
            ood.save(artifacts.out / OOD_DETECTOR)
            metrics |= ood.metrics(sft=sample_states, heldout=states)
        del scorer, member
        gc.collect()  # a trained model is in reference cycles, and the next needs the memory
    metrics |= write_challenge(
        artifacts.out / "challenge.csv", made, torch.stack(made_scores).mean(0) if made else torch.empty(0)
    )
    write_json(artifacts.out / "metrics.json", metrics | ensemble_metrics(params.kind, data, torch.stack(scores)))
    check_accuracy(data, torch.stack(scores).mean(0), params.min_accuracy)


def train_reward_model(
    params: RewardModelParams, lora: LoraParams | None, seed: int, data: TrainingData, artifacts: Artifacts, number: int
) -> TextScorer:
    """Train a member of the ensemble, or fetch a pretrained model; write its weights and history."""
    folder = member_folder(artifacts.out, number)
    if params.pretrained:
        fetch_pretrained_scorer(params.pretrained, params.max_length, folder)
        write_history(folder / "history.csv", [])
        return load_pretrained_scorer(folder)
    backbone, sft = backbone_of(artifacts.base_model, artifacts.sft, artifacts.out)
    seed, tokenizer = seed + number, load_tokenizer(backbone)
    history = HistoryCallback(f"reward_model, member {number}" if number else "reward_model")
    fresh = new_reward_model(backbone, sft, seed=seed, heads=len(data.weights))
    model = make_trainable(fresh, lora, seed=seed, head="score", first_layer=params.lora_first_layer)
    with tracking.prefixed(f"member_{number}") if number else nullcontext():
        train_or_resume(make_trainer(params, model, tokenizer, data, seed=seed, callbacks=[history]))
    model.config.num_labels = len(data.weights)  # a trainer of several heads shows one
    save_weights(model, folder)
    write_history(folder / "history.csv", history.rows)
    return TextScorer(model, tokenizer)


def _sample_sft_responses(
    params: RewardModelParams, generation: GenerationParams, seed: int, base_model: Path, sft: Path, prepare: Path
) -> list[PromptResponse]:
    """Sample the SFT policy's responses to training prompts."""
    prompts = [row.prompt for row in read_rows(prepare / "prompts" / "train.jsonl", Prompt)]
    prompts = (prompts * (params.normalisation_samples // len(prompts) + 1))[: params.normalisation_samples]
    sampler = LocalSampler(load_reference(base_model, sft), load_tokenizer(base_model), generation)
    rollout = sampler.sample(prompts, torch.Generator().manual_seed(seed))
    return list(zip(prompts, rollout.texts, strict=True))


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("reward_model")
