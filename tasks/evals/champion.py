"""Comparison with the champion: it responds to the prompts of the evaluation, and both are paired by prompt."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.core.rows import read_rows
from tasks.evals.compare import ScoredResponse
from tasks.evals.gate import paired_interval
from tasks.evals.scoring import PolicySampler, load_gold_reward, sample_prompts, score_responses
from tasks.evals.statistics import Interval
from tasks.models.loading import init_process, load_beside, load_policy, load_tokenizer

if TYPE_CHECKING:
    from tasks.config.evaluation import EvaluateParams
    from tasks.config.training import EnvironmentParams, GenerationParams

__all__ = ["compare_with_champion"]


def compare_with_champion(
    policy: str,
    params: EvaluateParams,
    generation: GenerationParams,
    seed: int,
    *,
    metrics: Collection[str],
    artifacts: Path,
    champion: Path,
    champion_policy: str,
    environment: EnvironmentParams | None = None,
) -> dict[str, Interval]:
    """Compute each metric of the challenger against the champion, with its 95 % bootstrap interval over prompts.

    The challenger's responses are those of the evaluation; the champion responds to the same prompts now, as often.

    Args:
        policy: the challenger, as the evaluation names it.
        metrics: of `tasks.evals.gate.METRICS`.
        champion: folder of the champion's base model, SFT and policy, laid out as in `artifacts`.
        champion_policy: the name of its policy.
    """
    init_process()
    prompts = sample_prompts(artifacts / "prepare" / "prompts" / "test.jsonl", params.prompts, seed)
    models = champion / "base_model", champion / "sft"
    sampler = PolicySampler(
        load_tokenizer(models[0]), prompts, generation, batch_size=params.batch_size, seed=seed,
        environment=environment, load_beside=partial(load_beside, *models),
    )  # fmt: skip
    model = load_policy(*models, champion / champion_policy)
    answers = sampler.sample("champion", model, samples_per_prompt=params.samples_per_prompt)
    gold = None
    if answers[0].environment_reward is None:
        gold = load_gold_reward(prompts, artifacts / "base_model", artifacts / "gold_judge", params.gold_rule)
    theirs = score_responses(answers, None, gold, vader=params.vader, accuracy=False)
    evaluated = read_rows(artifacts / "evaluate" / "responses.jsonl", ScoredResponse)
    draws = []
    for records in ([record for record in evaluated if record.policy == policy], theirs):
        by_prompt: dict[str, list[ScoredResponse]] = {row.id: [] for row in prompts}
        for record in records:
            by_prompt[record.prompt_id].append(record)
        draws.append(list(by_prompt.values()))
    return {name: paired_interval(name, *draws, samples=params.bootstrap_samples, seed=seed) for name in metrics}
