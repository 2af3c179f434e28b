"""The reward model: how much would people like this text? A linear head on a language model, or a finished model."""

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

from tasks.core import tracking
from tasks.core.files import write_json
from tasks.core.models import (
    ADAPTER,
    add_lora,
    load_reference,
    load_tokenizer,
    new_scorer,
    prepare_process,
    save_adapter,
)
from tasks.core.schema import Prompt, read_rows
from tasks.core.sections.generation import GenerationParams
from tasks.core.sections.lora import LoraParams
from tasks.core.sections.reward_model import RewardModelParams
from tasks.core.training import HistoryCallback, train_or_resume, write_history
from tasks.evals.assessment import correlation
from tasks.rewards.familiarity import Familiarity
from tasks.rewards.fetching import fetch_backbone, fetch_finished
from tasks.rewards.finished import Text, load_finished
from tasks.rewards.learned import FAMILIARITY, NORMALISATION, Member, member_folder, trunk_of
from tasks.rewards.lessons import Lesson, Side, read_lesson
from tasks.rewards.scorers import TextScorer
from tasks.rl.rollout import generate

__all__ = ["reward_model"]

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
    """Fit a reward model of the kind that is wanted, or take a finished one; measure it; normalise it.

    Writes adapter/ (with normalisation.json: μ and σ of each head's raw value on responses of the SFT policy;
    familiarity.safetensors: where the training texts lie; members/1, members/2, …: the further members of an ensemble,
    trained alike from the seeds that follow, each laid out like this folder; backbone/ or scorer/: a copy of the model
    that is not the SFT model), history.csv, accuracy_by_margin.csv, calibration.csv and metrics.json. The tables and
    figures are those of the first member, but for `ensemble_…`, that of the members' mean, and `mean_member_…`.

    Raises:
        DataError: the rows that this kind learns from are missing, or do not say what it must know.
        ModelError: a model is incomplete, or of an unfit architecture.
        SourceError: a backbone or scorer could not be fetched.
    """
    prepare_process()
    shutil.rmtree(out / ADAPTER, ignore_errors=True)
    lesson = read_lesson(params, prepare, preferences)
    samples = _responses(params, generation, seed, base_model, sft, prepare)
    metrics: dict[str, float] = dict(lesson.counts())
    if params.backbone:
        fetch_backbone(params.backbone, seed, out)
    scores: list[Tensor] = []
    for number in range(params.members):
        folder = member_folder(out, number)
        with tracking.part(f"member_{number}") if number else nullcontext():
            scorer, text = _scorer(params, lora, seed, lesson, *trunk_of(base_model, sft, out), folder, number)
        member, states = Member.fit(
            scorer, _texts(samples, text), lesson.weights,
            prompts=_prompts(samples), length_debias=params.length_debias,
        )  # fmt: skip
        write_json(folder / NORMALISATION, {**member.facts(), "max_length": params.max_length})
        test = lesson.sides("test")
        heldout, heldout_states = member.read(_texts(test, text), _prompts(test))
        scores.append(member.normalised(heldout))
        if number == 0:
            familiarity = _familiarity(member, lesson, text)
            familiarity.save(out / FAMILIARITY)
            metrics |= _scales(member) | lesson.measure(heldout, out)
            metrics |= _length_bias(member, heldout, lesson, text) | _unfamiliar(familiarity, states, heldout_states)
        del scorer, member
        gc.collect()  # a trained model holds itself in reference cycles, and the next needs the room
    write_json(out / "metrics.json", metrics | _of_the_ensemble(lesson, torch.stack(scores)))


def _scorer(
    params: RewardModelParams,
    lora: LoraParams,
    seed: int,
    lesson: Lesson,
    trunk: Path,
    sft: Path | None,
    folder: Path,
    number: int,
) -> tuple[TextScorer, Text]:
    """A member, trained or taken as it is, and how it wants its texts; its weights and history are in the folder."""
    if params.scorer:
        fetch_finished(params.scorer, params.max_length, folder)
        write_history(folder / "history.csv", [])
        return load_finished(folder)
    seed, tokenizer = seed + number, load_tokenizer(trunk)
    history = HistoryCallback(f"reward_model, member {number}" if number else "reward_model")
    fresh = new_scorer(trunk, sft, seed=seed, heads=len(lesson.weights))
    model = add_lora(fresh, lora, seed=seed, head="score", first_layer=params.first_layer)
    trainer = lesson.trainer(model, tokenizer, seed=seed, callbacks=[history])
    train_or_resume(trainer)
    save_adapter(model, folder)
    write_history(folder / "history.csv", history.rows)
    return TextScorer(model, tokenizer, max_length=params.max_length), add


def _responses(
    params: RewardModelParams, generation: GenerationParams, seed: int, base_model: Path, sft: Path, prepare: Path
) -> list[Side]:
    """What the SFT policy writes for training prompts."""
    tokenizer = load_tokenizer(base_model)
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
    responses = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in rollout.response_ids()]
    return list(zip(prompts, responses, strict=True))


def _texts(sides: Sequence[Side], text: Text) -> list[str]:
    return [text(prompt, response) for prompt, response in sides]


def _prompts(sides: Sequence[Side]) -> list[str]:
    return [prompt for prompt, _ in sides]


def _scales(member: Member) -> dict[str, float]:
    """Mean and spread of each head's raw value, and what a token adds to it where that was taken off."""
    figures: dict[str, float] = {}
    for name, head in member.heads.items():
        own = {f"raw_{fact}" if fact in ("mean", "std") else fact: value for fact, value in head.facts().items()}
        figures |= {f"{fact}/{name}" if name else fact: value for fact, value in own.items()}
    return figures


def _length_bias(member: Member, heldout: Tensor, lesson: Lesson, text: Text) -> dict[str, float]:
    """Correlation of score and number of tokens over held-out texts; also before length was taken off, where it was."""
    sides = lesson.sides("test")
    texts = _texts(sides, text)
    lengths = member.scorer.lengths(texts, whole=True)
    figures = {"length_correlation": correlation(_score(member, heldout), lengths)}
    if any(head.length_slope for head in member.heads.values()):
        biased = replace(member, heads={name: replace(head, length_slope=0.0) for name, head in member.heads.items()})
        figures["length_correlation_before"] = correlation(
            _score(biased, biased.read(texts, _prompts(sides))[0]), lengths
        )
    return figures


def _score(member: Member, values: Tensor) -> Tensor:
    """[N, K] → [N]: the raw value of a head that is alone."""
    return values[:, 0] if len(member.heads) == 1 else member.score(member.normalised(values))


def _familiarity(member: Member, lesson: Lesson, text: Text) -> Familiarity:
    splits = (lesson.sides("train", FAMILIAR_TEXTS), lesson.sides("validation"))
    return Familiarity.fit(*(member.scorer.read(list(dict.fromkeys(_texts(sides, text))))[1] for sides in splits))


def _unfamiliar(familiarity: Familiarity, samples: Tensor, heldout: Tensor) -> dict[str, float]:
    """The threshold, and the shares beyond it of the SFT policy's responses and of held-out texts of people."""
    return {
        "familiar_distance": familiarity.threshold,
        "unfamiliar_sft": familiarity.unfamiliar(samples).mean().item(),
        "unfamiliar_heldout": familiarity.unfamiliar(heldout).mean().item(),
    }


def _of_the_ensemble(lesson: Lesson, scores: Tensor) -> dict[str, float]:
    """How good members [members, N, K] are, together and each alone; nothing of one."""
    if len(scores) == 1:
        return {}
    name, together = lesson.quality(scores.mean(0))
    alone = [lesson.quality(own)[1] for own in scores]
    return {"members": len(scores), f"ensemble_{name}": together, f"mean_member_{name}": sum(alone) / len(alone)}


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("reward_model")
