"""Stage overoptimisation: proxy and gold reward of policy snapshots and of best-of-n."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.paths import Artifacts
from tasks.core.rows import write_json, write_table
from tasks.evals.compare import REFERENCE, ScoredResponse
from tasks.evals.overoptimisation import (
    BEST_OF_N,
    CurvePoint,
    Fit,
    best_of_n_points,
    fit_all,
    policy_point,
    score_matrix,
    to_row,
)
from tasks.evals.scoring import PolicySampler, load_gold_reward, sample_prompts, score_responses
from tasks.models.loading import init_process, is_disabled, load_beside, load_policy, load_reference, load_tokenizer
from tasks.rewards.composition import load_reward

if TYPE_CHECKING:
    from tasks.config.evaluation import OveroptimisationParams
    from tasks.config.reward import RewardParams
    from tasks.config.training import GenerationParams

__all__ = ["overoptimisation"]


def overoptimisation(
    params: OveroptimisationParams, generation: GenerationParams, reward: RewardParams, seed: int, artifacts: Artifacts
) -> None:
    """Score every policy snapshot of PPO and GRPO, and best-of-n of SFT; fit the forms of Gao et al. 2022.

    Writes points.csv (one row per policy and n), fits.json (method → judge → coefficients with intervals and the peak)
    and metrics.json (the coefficients alone).
    """
    init_process()
    prompts = sample_prompts(artifacts.prepare / "prompts" / "test.jsonl", params.prompts, seed)
    tokenizer = load_tokenizer(artifacts.base_model)
    batch_size = params.batch_size * params.samples_per_policy
    beside = partial(load_beside, artifacts.base_model, artifacts.sft)
    sampler = PolicySampler(tokenizer, prompts, generation, batch_size=batch_size, seed=seed, load_beside=beside)
    proxy = load_reward(reward, prompts, artifacts)
    gold = load_gold_reward(prompts, artifacts.base_model, artifacts.gold_judge)

    def score(name: str, policy: Any, samples: int) -> list[ScoredResponse]:
        responses = sampler.sample(name, policy, samples_per_prompt=samples)
        return score_responses(responses, proxy, gold, vader=False)

    answers = score(REFERENCE, load_reference(artifacts.base_model, artifacts.sft), params.samples_per_prompt)
    base = score_matrix(answers, len(prompts))
    points: dict[str, list[CurvePoint]] = {BEST_OF_N: best_of_n_points(base)}
    for method, folder in {"ppo": artifacts.ppo, "grpo": artifacts.grpo}.items():
        for snapshot in [] if is_disabled(folder) else sorted((folder / "policies").iterdir()):
            gc.collect()  # the previous policy is in reference cycles
            update, policy = int(snapshot.name), load_policy(artifacts.base_model, artifacts.sft, snapshot)
            answers = score(f"{method} after update {update}", policy, params.samples_per_policy)
            points.setdefault(method, []).append(policy_point(method, update, answers, base))
    _write(artifacts.out, points, fit_all(points, samples=params.bootstrap_samples, seed=seed))


def _write(out: Path, points: Mapping[str, Sequence[CurvePoint]], fits: Mapping[str, Mapping[str, Fit]]) -> None:
    """Write the points, the fits, and the coefficients as metrics."""
    write_table(out / "points.csv", [to_row(point) for own in points.values() for point in own])
    content = {method: {judge: asdict(fit) for judge, fit in own.items()} for method, own in fits.items()}
    write_json(out / "fits.json", content)
    write_json(out / "metrics.json", {
        method: {f"{judge}_{name}": fit[name]["mean"] for judge, fit in own.items() for name in ("alpha", "beta")}
        for method, own in content.items()
    })  # fmt: skip


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("overoptimisation")
