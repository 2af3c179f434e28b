"""A policy against the one in use: the same held-out prompts, the same random numbers, the gold judge."""

from __future__ import annotations

from pathlib import Path

from tasks.core.models import load_policy, load_tokenizer, prepare_process
from tasks.core.schema import read_rows
from tasks.core.sections.evaluate import EvaluateParams
from tasks.core.sections.generation import GenerationParams
from tasks.evals.compare import Judged
from tasks.evals.judging import Sampler, choose_prompts, gold_reward
from tasks.evals.statistics import Interval, bootstrap_mean, wins

__all__ = ["duel"]


def duel(
    policy: str,
    params: EvaluateParams,
    generation: GenerationParams,
    seed: int,
    *,
    artifacts: Path,
    champion: Path,
    champion_policy: str,
) -> Interval:
    """The policy's win rate against the champion, with its 95 % bootstrap interval over prompts.

    The policy's answers are those of the evaluation; the champion answers the same prompts now.

    Args:
        policy: the challenger, as the evaluation names it.
        artifacts: what the stages wrote.
        champion: the champion's base model, SFT and policy, laid out as in artifacts.
        champion_policy: the name of its policy.

    Raises:
        DataError: there is nothing that could judge.
        ModelError: a folder is incomplete.
    """
    prepare_process()
    prompts = choose_prompts(artifacts / "prepare" / "prompts" / "test.jsonl", params.prompts, seed)
    tokenizer = load_tokenizer(champion / "base_model")
    sampler = Sampler(tokenizer, prompts, generation, batch_size=params.batch_size, seed=seed)
    model = load_policy(champion / "base_model", champion / "sft", champion / champion_policy)
    answers = sampler.answers("champion", model)
    gold = gold_reward(prompts, artifacts / "base_model", artifacts / "gold_judge")
    theirs = gold([answer.prompt.prompt for answer in answers], [answer.response for answer in answers])
    records = read_rows(artifacts / "evaluate" / "responses.jsonl", Judged)
    ours = {record.prompt_id: record.gold for record in records if record.policy == policy}
    paired = [ours[answer.prompt.id] for answer in answers]
    return bootstrap_mean(wins(paired, list(theirs)), samples=params.bootstrap_samples, seed=seed)
