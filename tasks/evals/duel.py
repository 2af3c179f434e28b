"""Comparison of a policy with the champion on the same held-out prompts, random seed and judges."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.core.models import load_policy, load_tokenizer, init_process
from tasks.core.schema import Prompt, read_rows
from tasks.core.sections.environment import EnvironmentParams
from tasks.core.sections.evaluate import EvaluateParams
from tasks.core.sections.generation import GenerationParams
from tasks.evals.compare import ScoredResponse
from tasks.evals.judging import SampledResponse, PolicySampler, sample_prompts, load_gold_reward, vader_scores
from tasks.evals.noninferiority import paired_interval
from tasks.evals.statistics import Interval

__all__ = ["compare_with_champion"]


@dataclass(frozen=True)
class _ChampionResponse:
    """Champion's response to one prompt; see `tasks.evals.noninferiority.ResponseScores`."""

    response: str
    ended: bool
    kl: float
    gold: float
    vader: float | None


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

    The challenger's responses are those of the evaluation; the champion responds to the same prompts now.

    Args:
        policy: the challenger, as the evaluation names it.
        metrics: of `tasks.evals.noninferiority.METRICS`.
        artifacts: what the stages wrote.
        champion: the champion's base model, SFT and policy, laid out as in artifacts.
        champion_policy: the name of its policy.
        environment: environment of the evaluation, used for the champion too.

    Raises:
        DataError: no judge is available.
        ModelError: a folder is incomplete.
    """
    init_process()
    prompts = sample_prompts(artifacts / "prepare" / "prompts" / "test.jsonl", params.prompts, seed)
    tokenizer = load_tokenizer(champion / "base_model")
    sampler = PolicySampler(tokenizer, prompts, generation, batch_size=params.batch_size, seed=seed, environment=environment)
    model = load_policy(champion / "base_model", champion / "sft", champion / champion_policy)
    answers = sampler.sample("champion", model)
    champion_scores = _score_answers(answers, prompts, artifacts, params)
    records = read_rows(artifacts / "evaluate" / "responses.jsonl", ScoredResponse)
    by_prompt = {record.prompt_id: record for record in records if record.policy == policy}
    challenger_scores = [by_prompt[answer.prompt.id] for answer in answers]
    return {name: paired_interval(name, challenger_scores, champion_scores, samples=params.bootstrap_samples, seed=seed) for name in metrics}


def _score_answers(
    answers: Sequence[SampledResponse], prompts: Sequence[Prompt], artifacts: Path, params: EvaluateParams
) -> list[_ChampionResponse]:
    """Score the champion's responses with the judges of the evaluation."""
    prompt_texts, responses = [answer.prompt.prompt for answer in answers], [answer.response for answer in answers]
    gold = [answer.environment_reward for answer in answers if answer.environment_reward is not None] or load_gold_reward(
        prompts, artifacts / "base_model", artifacts / "gold_judge", params.gold_rule
    )(prompt_texts, responses)
    sentiment = vader_scores(prompt_texts, responses) if params.vader else [None] * len(answers)
    return [
        _ChampionResponse(answer.response, answer.ended, answer.kl, float(score), compound)
        for answer, score, compound in zip(answers, gold, sentiment, strict=True)
    ]
