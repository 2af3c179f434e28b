"""Comparison with the champion: it responds to the prompts of the evaluation, and both are paired by prompt."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.core.rows import Prompt, read_rows
from tasks.evals.compare import ScoredResponse
from tasks.evals.gate import ResponseScores, paired_interval
from tasks.evals.scoring import PolicySampler, SampledResponse, load_gold_reward, sample_prompts, vader_scores
from tasks.evals.statistics import Interval
from tasks.models.loading import init_process, load_policy, load_tokenizer

if TYPE_CHECKING:
    from tasks.config.evaluation import EvaluateParams
    from tasks.config.training import EnvironmentParams, GenerationParams

__all__ = ["compare_with_champion"]


@dataclass(frozen=True)
class _ChampionResponse:
    """Champion's response to one prompt; see `tasks.evals.gate.ResponseScores`."""

    response: str
    ended: bool
    kl: float | None
    scores: Mapping[str, float]


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

    Raises:
        DataError: no judge is available.
        ModelError: a folder is incomplete.
    """
    init_process()
    prompts = sample_prompts(artifacts / "prepare" / "prompts" / "test.jsonl", params.prompts, seed)
    tokenizer = load_tokenizer(champion / "base_model")
    sampler = PolicySampler(
        tokenizer, prompts, generation, batch_size=params.batch_size, seed=seed, environment=environment
    )
    model = load_policy(champion / "base_model", champion / "sft", champion / champion_policy)
    answers = sampler.sample("champion", model, samples_per_prompt=params.samples_per_prompt)
    own: dict[str, list[ResponseScores]] = {row.id: [] for row in prompts}
    theirs: dict[str, list[ResponseScores]] = {row.id: [] for row in prompts}
    for record in read_rows(artifacts / "evaluate" / "responses.jsonl", ScoredResponse):
        if record.policy == policy:
            own[record.prompt_id].append(record)
    for answer, scored in zip(answers, _score(answers, prompts, artifacts, params), strict=True):
        theirs[answer.prompt.id].append(scored)
    draws = list(own.values()), list(theirs.values())
    return {name: paired_interval(name, *draws, samples=params.bootstrap_samples, seed=seed) for name in metrics}


def _score(
    answers: Sequence[SampledResponse], prompts: Sequence[Prompt], artifacts: Path, params: EvaluateParams
) -> list[_ChampionResponse]:
    """Score the champion's responses with the judges of the evaluation."""
    texts, responses = [answer.prompt.prompt for answer in answers], [answer.response for answer in answers]
    gold = [answer.environment_reward for answer in answers if answer.environment_reward is not None]
    if not gold:
        judge = load_gold_reward(prompts, artifacts / "base_model", artifacts / "gold_judge", params.gold_rule)
        gold = [float(score) for score in judge(texts, responses)]
    scores = {"gold": gold} | ({"vader": vader_scores(texts, responses)} if params.vader else {})
    by_response = [{judge: values[row] for judge, values in scores.items()} for row in range(len(answers))]
    return [
        _ChampionResponse(answer.response, answer.ended, answer.kl, own)
        for answer, own in zip(answers, by_response, strict=True)
    ]
