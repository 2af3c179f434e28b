"""Stage overoptimisation: proxy and gold reward of policy snapshots and of best-of-n."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.core.paths import Artifacts
from tasks.core.rows import write_json, write_table
from tasks.evals.compare import REFERENCE, ScoredResponse
from tasks.evals.overoptimisation import (
    BEST_OF_N,
    CurvePoint,
    best_of_n_points,
    fit_all,
    policy_point,
    score_matrix,
    to_row,
)
from tasks.evals.scoring import PolicySampler, SampledResponse, load_gold_reward, sample_prompts, score_responses
from tasks.models.loading import init_process, is_disabled, load_policy, load_reference, load_tokenizer
from tasks.rewards.composition import load_reward

if TYPE_CHECKING:
    from tasks.config.evaluation import OveroptimisationParams
    from tasks.config.reward import RewardParams
    from tasks.config.training import GenerationParams

__all__ = ["overoptimisation"]


def overoptimisation(
    params: OveroptimisationParams,
    generation: GenerationParams,
    reward: RewardParams,
    seed: int,
    artifacts: Artifacts,
) -> None:
    """Score every policy snapshot of PPO and GRPO, and best-of-n of SFT; fit the forms of Gao et al. 2022.

    Writes points.csv (one row per policy and n), fits.json (method → judge → coefficients with intervals and the peak)
    and metrics.json (the coefficients alone).
    """
    init_process()
    prompts = sample_prompts(artifacts.prepare / "prompts" / "test.jsonl", params.prompts, seed)
    proxy = load_reward(reward, prompts, artifacts)
    gold = load_gold_reward(prompts, artifacts.base_model, artifacts.gold_judge)

    def score(answers: list[SampledResponse]) -> list[ScoredResponse]:
        return score_responses(answers, proxy, gold, vader=False)

    sampler = PolicySampler(
        load_tokenizer(artifacts.base_model), prompts, generation, batch_size=params.batch_size, seed=seed
    )
    sft_answers = sampler.sample(
        REFERENCE, load_reference(artifacts.base_model, artifacts.sft), samples_per_prompt=params.samples_per_prompt
    )
    base = score_matrix(score(sft_answers), len(prompts))
    levels: dict[str, list[CurvePoint]] = {BEST_OF_N: best_of_n_points(base)}
    for method, folder in (("ppo", artifacts.ppo), ("grpo", artifacts.grpo)):
        if not is_disabled(folder):
            answers = _snapshot_answers(
                method, folder, sampler, params.samples_per_policy, artifacts.base_model, artifacts.sft
            )
            levels[method] = [policy_point(method, update, score(own), base) for update, own in answers]
    write_table(artifacts.out / "points.csv", [to_row(level) for own in levels.values() for level in own])
    fitted = fit_all(levels, samples=params.bootstrap_samples, seed=seed)
    write_json(
        artifacts.out / "fits.json",
        {way: {by: found.to_dict() for by, found in own.items()} for way, own in fitted.items()},
    )
    metrics = {
        way: {f"{by}_{name}": value.mean for by, found in own.items() for name, value in found.coefficients().items()}
        for way, own in fitted.items()
    }
    write_json(artifacts.out / "metrics.json", metrics)


def _snapshot_answers(
    method: str, folder: Path, sampler: PolicySampler, samples: int, base_model: Path, sft: Path
) -> Iterator[tuple[int, list[SampledResponse]]]:
    """Yield each snapshot's update and sampled responses."""
    for snapshot in sorted((folder / "policies").iterdir()):
        gc.collect()  # the previous policy is in reference cycles
        update, policy = int(snapshot.name), load_policy(base_model, sft, snapshot)
        yield update, sampler.sample(f"{method} after update {update}", policy, samples_per_prompt=samples)


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("overoptimisation")
