"""A policy against the one in use: the same held-out prompts, the same random numbers, the same judges."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.core.models import load_policy, load_tokenizer, init_process
from tasks.core.schema import Prompt, read_rows
from tasks.core.sections.environment import EnvironmentParams
from tasks.core.sections.evaluate import EvaluateParams
from tasks.core.sections.generation import GenerationParams
from tasks.evals.compare import Judged
from tasks.evals.judging import Answer, Sampler, choose_prompts, gold_reward, vader_scores
from tasks.evals.noninferiority import compared
from tasks.evals.statistics import Interval

__all__ = ["duel"]


@dataclass(frozen=True)
class _Scored:
    """The champion's answer to one prompt; see `tasks.evals.noninferiority.Scored`."""

    response: str
    ended: bool
    kl: float
    gold: float
    vader: float | None


def duel(
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
    """Each metric of the policy beside the champion, with its 95 % bootstrap interval over prompts.

    The policy's answers are those of the evaluation; the champion answers the same prompts now.

    Args:
        policy: the challenger, as the evaluation names it.
        metrics: of `tasks.evals.noninferiority.METRICS`.
        artifacts: what the stages wrote.
        champion: the champion's base model, SFT and policy, laid out as in artifacts.
        champion_policy: the name of its policy.
        environment: that of the evaluation; the champion talks with it, too.

    Raises:
        DataError: there is nothing that could judge.
        ModelError: a folder is incomplete.
    """
    init_process()
    prompts = choose_prompts(artifacts / "prepare" / "prompts" / "test.jsonl", params.prompts, seed)
    tokenizer = load_tokenizer(champion / "base_model")
    sampler = Sampler(tokenizer, prompts, generation, batch_size=params.batch_size, seed=seed, environment=environment)
    model = load_policy(champion / "base_model", champion / "sft", champion / champion_policy)
    answers = sampler.answers("champion", model)
    theirs = _scored(answers, prompts, artifacts, params)
    records = read_rows(artifacts / "evaluate" / "responses.jsonl", Judged)
    by_prompt = {record.prompt_id: record for record in records if record.policy == policy}
    ours = [by_prompt[answer.prompt.id] for answer in answers]
    return {name: compared(name, ours, theirs, samples=params.bootstrap_samples, seed=seed) for name in metrics}


def _scored(
    answers: Sequence[Answer], prompts: Sequence[Prompt], artifacts: Path, params: EvaluateParams
) -> list[_Scored]:
    """The answers with the scores of the judges of the evaluation."""
    asked, responses = [answer.prompt.prompt for answer in answers], [answer.response for answer in answers]
    gold = [answer.earned for answer in answers if answer.earned is not None] or gold_reward(
        prompts, artifacts / "base_model", artifacts / "gold_judge", params.gold_rule
    )(asked, responses)
    sentiment = vader_scores(asked, responses) if params.vader else [None] * len(answers)
    return [
        _Scored(answer.response, answer.ended, answer.kl, float(score), compound)
        for answer, score, compound in zip(answers, gold, sentiment, strict=True)
    ]
