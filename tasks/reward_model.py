"""Stage reward_model: train a linear head on a language model, or take a pretrained reward model."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from operator import add
from pathlib import Path

import torch
from torch import Tensor

from tasks.config.training import GenerationParams, LoraParams, RewardModelParams
from tasks.core import tracking
from tasks.core.paths import Artifacts
from tasks.core.rows import Prompt, read_rows, write_json
from tasks.models.hf_training import HistoryCallback, train_or_resume, write_history
from tasks.models.loading import (
    ADAPTER_DIR,
    add_lora,
    init_process,
    load_reference,
    load_tokenizer,
    new_reward_model,
    save_adapter,
)
from tasks.rewards.metrics import correlation
from tasks.rewards.objectives import Objective, PromptResponse, load_objective
from tasks.rewards.ood import MahalanobisOOD
from tasks.rewards.pretrained import Formatter, fetch_backbone, fetch_pretrained_scorer, load_pretrained_scorer
from tasks.rewards.reward_model import NORMALISATION, OOD_DETECTOR, EnsembleMember, backbone_of, member_folder
from tasks.rewards.scorers import TextScorer
from tasks.rl.rollout import LocalSampler

__all__ = ["reward_model"]

OOD_FIT_TEXTS = 512
"""Training texts that the OOD detector is fitted on. A hundred find nearly what all 1,600 find: all made-up
nonsense, four fifths of shuffled sentences, and 34 instead of 30 % of SFT's responses, most of them cut short."""


def reward_model(
    params: RewardModelParams,
    lora: LoraParams,
    generation: GenerationParams,
    seed: int,
    artifacts: Artifacts,
) -> None:
    """Train a reward model, or load a pretrained one; evaluate and normalise it.

    Writes adapter/ (with normalisation.json: μ and σ of each head's raw value on responses of the SFT policy;
    familiarity.safetensors: where the training texts lie; members/1, members/2, …: the further members of an ensemble,
    trained alike from the seeds that follow, each laid out like this folder; backbone/ or scorer/: a copy of the model
    that is not the SFT model), history.csv, accuracy_by_margin.csv, calibration.csv and metrics.json. The tables and
    figures are those of the first member, but for `ensemble_…`, that of the members' mean, and `mean_member_…`.

    Raises:
        DataError: the rows that this kind learns from are missing, or do not say what it must know.
        ModelError: a model is incomplete, or of an unfit architecture.
        SourceError: a backbone or pretrained model could not be fetched.
    """
    init_process()
    shutil.rmtree(artifacts.out / ADAPTER_DIR, ignore_errors=True)
    data = load_objective(params, artifacts.prepare, artifacts.preferences)
    samples = _sample_sft_responses(params, generation, seed, artifacts.base_model, artifacts.sft, artifacts.prepare)
    metrics: dict[str, float] = dict(data.dataset_sizes())
    if params.backbone:
        fetch_backbone(params.backbone, seed, artifacts.out)
    scores: list[Tensor] = []
    for number in range(params.ensemble_size):
        folder = member_folder(artifacts.out, number)
        with tracking.prefixed(f"member_{number}") if number else nullcontext():
            scorer, text = _train_member(
                params,
                lora,
                seed,
                data,
                *backbone_of(artifacts.base_model, artifacts.sft, artifacts.out),
                folder,
                number,
            )
        member, states = EnsembleMember.fit(
            scorer, _texts(samples, text), data.weights,
            prompts=_prompts(samples), length_debias=params.length_debias,
        )  # fmt: skip
        write_json(folder / NORMALISATION, {**member.to_dict(), "max_length": params.max_length})
        test = data.texts("test")
        heldout, heldout_states = member.raw_scores(_texts(test, text), _prompts(test))
        scores.append(member.normalise(heldout))
        if number == 0:
            ood = _fit_ood(member, data, text)
            ood.save(artifacts.out / OOD_DETECTOR)
            metrics |= _normalisation_metrics(member) | data.evaluate(heldout, artifacts.out)
            metrics |= _length_bias(member, heldout, data, text) | _ood_metrics(ood, states, heldout_states)
        del scorer, member
        gc.collect()  # a trained model is in reference cycles, and the next needs the memory
    write_json(artifacts.out / "metrics.json", metrics | _ensemble_metrics(data, torch.stack(scores)))


def _train_member(
    params: RewardModelParams,
    lora: LoraParams,
    seed: int,
    data: Objective,
    backbone: Path,
    sft: Path | None,
    folder: Path,
    number: int,
) -> tuple[TextScorer, Formatter]:
    """Train or load a member and its text format; write its weights and history into the folder."""
    if params.pretrained:
        fetch_pretrained_scorer(params.pretrained, params.max_length, folder)
        write_history(folder / "history.csv", [])
        return load_pretrained_scorer(folder)
    seed, tokenizer = seed + number, load_tokenizer(backbone)
    history = HistoryCallback(f"reward_model, member {number}" if number else "reward_model")
    fresh = new_reward_model(backbone, sft, seed=seed, heads=len(data.weights))
    model = add_lora(fresh, lora, seed=seed, head="score", first_layer=params.lora_first_layer)
    trainer = data.trainer(model, tokenizer, seed=seed, callbacks=[history])
    train_or_resume(trainer)
    save_adapter(model, folder)
    write_history(folder / "history.csv", history.rows)
    return TextScorer(model, tokenizer, max_length=params.max_length), add


def _sample_sft_responses(
    params: RewardModelParams, generation: GenerationParams, seed: int, base_model: Path, sft: Path, prepare: Path
) -> list[PromptResponse]:
    """Sample the SFT policy's responses to training prompts."""
    prompts = [row.prompt for row in read_rows(prepare / "prompts" / "train.jsonl", Prompt)]
    prompts = (prompts * (params.normalisation_samples // len(prompts) + 1))[: params.normalisation_samples]
    sampler = LocalSampler(load_reference(base_model, sft), load_tokenizer(base_model), generation)
    rollout = sampler.sample(prompts, torch.Generator().manual_seed(seed))
    return list(zip(prompts, rollout.texts, strict=True))


def _texts(sides: Sequence[PromptResponse], text: Formatter) -> list[str]:
    return [text(prompt, response) for prompt, response in sides]


def _prompts(sides: Sequence[PromptResponse]) -> list[str]:
    return [prompt for prompt, _ in sides]


def _normalisation_metrics(member: EnsembleMember) -> dict[str, float]:
    """Mean and standard deviation of each head's raw value, and the length slope where it was removed."""
    figures: dict[str, float] = {}
    for name, head in member.heads.items():
        own = {f"raw_{fact}" if fact in ("mean", "std") else fact: value for fact, value in head.to_dict().items()}
        figures |= {f"{fact}/{name}" if name else fact: value for fact, value in own.items()}
    return figures


def _length_bias(member: EnsembleMember, heldout: Tensor, data: Objective, text: Formatter) -> dict[str, float]:
    """Correlation of score and number of tokens over held-out texts, also before length debiasing."""
    sides = data.texts("test")
    texts = _texts(sides, text)
    lengths = member.scorer.lengths(texts, untruncated=True)
    figures = {"length_correlation": correlation(_score(member, heldout), lengths)}
    if any(head.length_slope for head in member.heads.values()):
        biased = replace(member, heads={name: replace(head, length_slope=0.0) for name, head in member.heads.items()})
        figures["length_correlation_before"] = correlation(
            _score(biased, biased.raw_scores(texts, _prompts(sides))[0]), lengths
        )
    return figures


def _score(member: EnsembleMember, values: Tensor) -> Tensor:
    """[N, K] → [N]: the raw value of a head that is alone."""
    return values[:, 0] if len(member.heads) == 1 else member.score(member.normalise(values))


def _fit_ood(member: EnsembleMember, data: Objective, text: Formatter) -> MahalanobisOOD:
    splits = (data.texts("train", OOD_FIT_TEXTS), data.texts("validation"))
    return MahalanobisOOD.fit(
        *(member.scorer.scores_and_states(list(dict.fromkeys(_texts(sides, text))))[1] for sides in splits)
    )


def _ood_metrics(ood: MahalanobisOOD, samples: Tensor, heldout: Tensor) -> dict[str, float]:
    """The threshold, and the shares of SFT responses and of held-out human texts beyond it."""
    return {
        "familiar_distance": ood.threshold,
        "ood_share_sft": ood.is_ood(samples).mean().item(),
        "ood_share_heldout": ood.is_ood(heldout).mean().item(),
    }


def _ensemble_metrics(data: Objective, scores: Tensor) -> dict[str, float]:
    """Headline metric of the ensemble and the mean over its members [members, N, K]; empty for one member."""
    if len(scores) == 1:
        return {}
    name, ensemble = data.headline_metric(scores.mean(0))
    single = [data.headline_metric(own)[1] for own in scores]
    return {"members": len(scores), f"ensemble_{name}": ensemble, f"mean_member_{name}": sum(single) / len(single)}


if __name__ == "__main__":
    from tasks.core.stage import run_stage

    run_stage("reward_model")
