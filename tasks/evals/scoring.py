"""Sampling of policies on the same prompts and seed, and scoring of the responses by every judge."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from tasks.config.base import ENVIRONMENT
from tasks.core.errors import DataError, TrainingError
from tasks.core.rows import Prompt, read_rows
from tasks.core.terminal import Progress
from tasks.evals.compare import ScoredResponse
from tasks.models.loading import is_disabled
from tasks.rewards.composition import CompositeReward, rule_component
from tasks.rewards.reward_model import GoldJudge
from tasks.rewards.rules.answers import exact_match, strict_match
from tasks.rewards.rules.base import RewardFunction
from tasks.rl.advantages import discount_by_turns
from tasks.rl.kl import kl_estimates, per_sequence
from tasks.rl.multi_turn import EnvironmentReward, MultiTurnRollout, with_environment
from tasks.rl.policy import Policy
from tasks.rl.rollout import LocalSampler, Rollout, derive_generator

if TYPE_CHECKING:
    from tasks.config.rules import RuleOptions
    from tasks.config.training import EnvironmentParams, GenerationParams

__all__ = ["PolicySampler", "SampledResponse", "load_gold_reward", "sample_prompts", "score_responses", "vader_scores"]


def sample_prompts(path: Path, count: int, seed: int) -> list[Prompt]:
    """Sample `count` prompts of the file without replacement, by the seed.

    Raises:
        DataError: the file holds fewer, or is missing or malformed.
    """
    rows = read_rows(path, Prompt)
    if len(rows) < count:
        raise DataError(
            f"{path} holds {len(rows)} prompts, evaluate.prompts asks for {count}; lower it to {len(rows)} or less, or "
            "raise prepare.test_share"
        )
    random.Random(seed).shuffle(rows)
    return rows[:count]


@dataclass(frozen=True)
class SampledResponse:
    """Response before scoring; fields as in `ScoredResponse`.

    Attributes:
        environment_reward: of the conversation; None without an environment.
        turns: number of the policy's turns.
        turn_discount: γ^(turns − 1), the discount of a score that comes with the last turn.
    """

    policy: str
    prompt: Prompt
    response: str
    tokens: int
    ended: bool
    kl: float
    kl_k3: float
    conversation: str | None = None
    environment_reward: float | None = None
    turns: int = 1
    turn_discount: float = 1.0


class PolicySampler:
    """Sampler of responses or multi-turn conversations for several policies, with the same seed for each."""

    def __init__(
        self,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        generation: GenerationParams,
        *,
        batch_size: int,
        seed: int,
        environment: EnvironmentParams | None = None,
    ) -> None:
        self._tokenizer, self._generation, self._seed, self._environment = tokenizer, generation, seed, environment
        self._batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]

    def sample(self, name: str, model: Any, *, samples_per_prompt: int = 1) -> list[SampledResponse]:
        """Sample responses prompt by prompt, with their KL to the reference; 0 without an adapter."""
        sampler = with_environment(LocalSampler(model, self._tokenizer, self._generation), self._environment)
        generator = torch.Generator().manual_seed(self._seed)
        answers: list[SampledResponse] = []
        progress = Progress(f"answers of {name}", len(self._batches), "batch")
        for number, prompts in enumerate(self._batches):
            if self._environment:  # each turn derives its numbers from a generator's seed
                generator = derive_generator(self._seed, number)
            rollout = sampler.sample(prompts, generator, samples_per_prompt=samples_per_prompt)
            rows = [row for row in prompts for _ in range(samples_per_prompt)]
            answers += self._to_responses(name, rows, rollout, self._reference_logprobs(model, rollout))
            progress.update(number + 1)
        progress.close()
        return answers

    def _reference_logprobs(self, model: Any, rollout: Rollout) -> Tensor:
        if not isinstance(model, PeftModel):
            return rollout.logprobs
        policy = Policy(model, temperature=self._generation.temperature, value_head=False)
        return policy.reference_logprobs(rollout)

    def _to_responses(
        self, name: str, prompts: Sequence[Prompt], rollout: Rollout, reference_logprobs: Tensor
    ) -> list[SampledResponse]:
        mask = rollout.response_mask
        kl = kl_estimates(rollout.logprobs, reference_logprobs, mask)
        columns = zip(
            prompts,
            rollout.texts,
            mask.sum(1).tolist(),
            rollout.has_eos.tolist(),
            per_sequence(kl.k1, mask).tolist(),
            per_sequence(kl.k3, mask).tolist(),
            strict=True,
        )
        answers = [SampledResponse(name, *values) for values in columns]
        if self._environment is None or not isinstance(rollout, MultiTurnRollout):
            return answers
        discounts = discount_by_turns(torch.ones(len(answers)), rollout.turns, self._environment.gamma).tolist()
        rewards, turns = rollout.rewards.tolist(), rollout.turns.tolist()
        return [
            replace(answer, conversation=text, environment_reward=reward, turns=number, turn_discount=discount)
            for answer, text, reward, number, discount in zip(
                answers, rollout.transcripts, rewards, turns, discounts, strict=True
            )
        ]


def load_gold_reward(
    prompts: Sequence[Prompt], base_model: Path, gold_judge: Path, rule: RuleOptions | None = None
) -> RewardFunction:
    """Load the gold reward: a model of human ratings that training never saw, a rule, or the right answers.

    Raises:
        DataError: none of them is available.
    """
    if not is_disabled(gold_judge):
        return GoldJudge.load(base_model, gold_judge)
    answers = {row.prompt: row.answer for row in prompts if row.answer is not None}
    if rule is not None:
        reward = CompositeReward({"gold": rule_component("gold", rule, answers)}, {"gold": 1.0})
        return lambda prompt_texts, responses: reward(prompt_texts, responses).total
    if len(answers) < len(prompts):
        raise DataError(
            f"gold_judge is off (null in params.yaml), and only {len(answers)} of {len(prompts)} held-out prompts have "
            "a right answer, so nothing independent can judge the policies: switch it on, give prompts an `answer`, or "
            "set evaluate.gold_rule"
        )
    return lambda prompt_texts, responses: [
        exact_match(text, answers[prompt]) for prompt, text in zip(prompt_texts, responses, strict=True)
    ]


def score_responses(
    answers: Sequence[SampledResponse],
    reward: CompositeReward,
    gold_reward: RewardFunction | None,
    *,
    vader: bool,
    answer_pattern: str | None = None,
    accuracy: bool = True,
) -> list[ScoredResponse]:
    """Score every response by every judge, and its accuracy, strict and flexible, if the right answer is known.

    Args:
        gold_reward: None if an environment judged: then its reward is the gold score.
        answer_pattern: see `strict_match`.
        accuracy: whether right answers are texts to compare with, and not input of a rule.
    """
    prompts = [answer.prompt.prompt for answer in answers]
    responses = [answer.response for answer in answers]
    if gold_reward is None:
        gold_scores = torch.tensor([answer.environment_reward or 0.0 for answer in answers])
        turns = torch.tensor([answer.turns for answer in answers])
        proxy = reward(prompts, responses, external={ENVIRONMENT: EnvironmentReward(gold_scores, turns)})
    else:
        proxy = reward(prompts, responses)
        gold_scores = torch.as_tensor(gold_reward(prompts, responses))
    if not torch.isfinite(gold_scores).all():
        raise TrainingError("the gold judge gives a score that is not finite: retrain it with a lower learning_rate")
    sentiment = vader_scores(prompts, responses) if vader else [None] * len(answers)
    return [
        ScoredResponse(
            id=f"{answer.policy}/{answer.prompt.id}",
            policy=answer.policy,
            prompt_id=answer.prompt.id,
            prompt=answer.prompt.prompt,
            response=answer.response,
            tokens=answer.tokens,
            ended=answer.ended,
            kl=answer.kl,
            kl_k3=answer.kl_k3,
            proxy=proxy.total[row].item() * answer.turn_discount,
            rewards={name: values[row].item() for name, values in proxy.components.items()},
            gold=gold_scores[row].item(),
            vader=sentiment[row],
            correct=_answer_accuracy(answer, answer_pattern) if accuracy else None,
            metrics={name: values[row].item() for name, values in proxy.metrics.items()},
            conversation=answer.conversation,
        )
        for row, answer in enumerate(answers)
    ]


def _answer_accuracy(answer: SampledResponse, pattern: str | None) -> dict[str, bool] | None:
    expected = answer.prompt.answer
    if expected is None or answer.environment_reward is not None:
        return None
    strict, flexible = strict_match(answer.response, expected, pattern), exact_match(answer.response, expected)
    return {"strict": bool(strict), "flexible": bool(flexible)}


def vader_scores(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Score each prompt with its response by VADER's compound score, in [−1, 1]."""
    lexicon: Any = SentimentIntensityAnalyzer()
    texts = (prompt + response for prompt, response in zip(prompts, responses, strict=True))
    return [lexicon.polarity_scores(text)["compound"] for text in texts]
