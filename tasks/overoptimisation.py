"""Where does more proxy reward stop being better? Policies on their way from SFT, and best-of-n, by proxy and gold."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

from tasks.core.files import write_json, write_table
from tasks.core.models import is_off, load_policy, load_reference, load_tokenizer, prepare_process
from tasks.core.sections.generation import GenerationParams
from tasks.core.sections.overoptimisation import OveroptimisationParams
from tasks.core.sections.reward import RewardParams
from tasks.evals.compare import REFERENCE, Judged
from tasks.evals.judging import Answer, Sampler, choose_prompts, gold_reward, judge
from tasks.evals.overoptimisation import BEST_OF_N, Level, best_of_n_levels, fits, point, policy_level, scores
from tasks.rewards.composition import load_reward

__all__ = ["overoptimisation"]


def overoptimisation(
    params: OveroptimisationParams,
    generation: GenerationParams,
    reward: RewardParams,
    seed: int,
    *,
    base_model: Path,
    sft: Path,
    reward_model: Path,
    gold_judge: Path,
    ppo: Path,
    grpo: Path,
    prepare: Path,
    out: Path,
) -> None:
    """Measure every kept policy of PPO and GRPO, and the best of n responses of SFT; fit the forms of Gao et al. 2022.

    Writes points.csv (one row per policy and n), fits.json (method → judge → coefficients with intervals and the peak)
    and metrics.json (the coefficients alone).
    """
    prepare_process()
    prompts = choose_prompts(prepare / "prompts" / "test.jsonl", params.prompts, seed)
    proxy = load_reward(reward, prompts, base_model=base_model, sft=sft, reward_model=reward_model)
    gold = gold_reward(prompts, base_model, gold_judge)

    def measured(answers: list[Answer]) -> list[Judged]:
        return judge(answers, proxy, gold, vader=False)

    sampler = Sampler(load_tokenizer(base_model), prompts, generation, batch_size=params.batch_size, seed=seed)
    many = sampler.answers(REFERENCE, load_reference(base_model, sft), samples_per_prompt=params.samples_per_prompt)
    base = scores(measured(many), len(prompts))
    levels: dict[str, list[Level]] = {BEST_OF_N: best_of_n_levels(base)}
    for method, folder in (("ppo", ppo), ("grpo", grpo)):
        if not is_off(folder):
            answers = _on_the_way(method, folder, sampler, params.policy_samples, base_model, sft)
            levels[method] = [policy_level(method, update, measured(own), base) for update, own in answers]
    write_table(out / "points.csv", [point(level) for own in levels.values() for level in own])
    fitted = fits(levels, samples=params.bootstrap_samples, seed=seed)
    write_json(
        out / "fits.json", {way: {by: found.plain() for by, found in own.items()} for way, own in fitted.items()}
    )
    metrics = {
        way: {f"{by}_{name}": value.mean for by, found in own.items() for name, value in found.coefficients().items()}
        for way, own in fitted.items()
    }
    write_json(out / "metrics.json", metrics)


def _on_the_way(
    method: str, folder: Path, sampler: Sampler, samples: int, base_model: Path, sft: Path
) -> Iterator[tuple[int, list[Answer]]]:
    """Each kept policy's update and answers."""
    for kept in sorted((folder / "policies").iterdir()):
        gc.collect()  # the policy before it holds itself in reference cycles
        update, policy = int(kept.name), load_policy(base_model, sft, kept)
        yield update, sampler.answers(f"{method} after update {update}", policy, samples_per_prompt=samples)


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("overoptimisation")
