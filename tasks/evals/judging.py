"""Letting policies answer the same prompts with the same random numbers, and every judge score the answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from tasks.core.errors import DataError, TrainingError
from tasks.core.models import is_off
from tasks.core.schema import Prompt, read_rows
from tasks.core.sections.generation import GenerationParams
from tasks.core.sections.rules import RuleOptions
from tasks.evals.compare import Judged
from tasks.rewards.composition import CompositeReward, rule_component
from tasks.rewards.learned import GoldJudge
from tasks.rewards.rules.answers import right_answer, right_in_form
from tasks.rewards.rules.kinds import RewardFunction
from tasks.rl.kl import kl_estimates, per_sequence
from tasks.rl.policy import Policy
from tasks.rl.rollout import Rollout, generate

__all__ = ["Answer", "Sampler", "choose_prompts", "gold_reward", "judge", "vader_scores"]


def choose_prompts(path: Path, count: int, seed: int) -> list[Prompt]:
    """The first `count` prompts of the file after a shuffle that the seed fixes.

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
class Answer:
    """One response before anyone has judged it; the fields mean what they mean in `Judged`."""

    policy: str
    prompt: Prompt
    response: str
    tokens: int
    ended: bool
    kl: float
    kl_k3: float


class Sampler:
    """Lets policies answer the prompts, always with the same random numbers."""

    def __init__(
        self, tokenizer: Any, prompts: Sequence[Prompt], generation: GenerationParams, *, batch_size: int, seed: int
    ) -> None:
        self._tokenizer, self._generation, self._seed = tokenizer, generation, seed
        self._batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]

    def answers(self, name: str, model: Any, *, samples_per_prompt: int = 1) -> list[Answer]:
        """Responses prompt by prompt, with their KL to the reference; 0 for the reference, which has no adapter."""
        rollouts = self._rollouts(model, samples_per_prompt)
        return [
            answer
            for prompts, rollout in zip(self._batches, rollouts, strict=True)
            for answer in self._described(name, prompts, rollout, self._reference_logprobs(model, rollout))
        ]

    def _rollouts(self, model: Any, samples_per_prompt: int) -> list[Rollout]:
        generator = torch.Generator().manual_seed(self._seed)
        return [
            generate(
                model,
                [self._tokenizer(row.prompt).input_ids for row in batch],
                max_new_tokens=self._generation.max_new_tokens,
                temperature=self._generation.temperature,
                eos_token_id=self._tokenizer.eos_token_id,
                pad_token_id=self._tokenizer.pad_token_id,
                generator=generator,
                samples_per_prompt=samples_per_prompt,
            )
            for batch in self._batches
        ]

    def _reference_logprobs(self, model: Any, rollout: Rollout) -> Tensor:
        if not isinstance(model, PeftModel):
            return rollout.logprobs
        return Policy(model, temperature=self._generation.temperature).reference_logprobs(rollout)

    def _described(
        self, name: str, prompts: Sequence[Prompt], rollout: Rollout, reference_logprobs: Tensor
    ) -> list[Answer]:
        mask = rollout.response_mask
        kl = kl_estimates(rollout.logprobs, reference_logprobs, mask)
        samples = len(mask) // len(prompts)
        columns = zip(
            [prompt for prompt in prompts for _ in range(samples)],
            rollout.response_ids(),
            mask.sum(1).tolist(),
            rollout.ended.tolist(),
            per_sequence(kl.k1, mask).tolist(),
            per_sequence(kl.k3, mask).tolist(),
            strict=True,
        )
        return [
            Answer(name, prompt, self._tokenizer.decode(ids, skip_special_tokens=True), tokens, ended, k1, k3)
            for prompt, ids, tokens, ended, k1, k3 in columns
        ]


def gold_reward(
    prompts: Sequence[Prompt], base_model: Path, gold_judge: Path, rule: RuleOptions | None = None
) -> RewardFunction:
    """What stands for the truth: a model of people's ratings that training never saw, a rule, or the right answers.

    Raises:
        DataError: there are neither.
    """
    if not is_off(gold_judge):
        return GoldJudge.load(base_model, gold_judge)
    answers = {row.prompt: row.answer for row in prompts if row.answer is not None}
    if rule is not None:
        reward = CompositeReward({"gold": rule_component("gold", rule, answers)}, {"gold": 1.0})
        return lambda asked, responses: reward(asked, responses).total
    if len(answers) < len(prompts):
        raise DataError(
            f"gold_judge is off (null in params.yaml), and only {len(answers)} of {len(prompts)} held-out prompts have "
            "a right answer, so nothing independent can judge the policies: switch it on, give prompts an `answer`, or "
            "set evaluate.gold_rule"
        )
    return lambda asked, responses: [
        right_answer(text, answers[prompt]) for prompt, text in zip(asked, responses, strict=True)
    ]


def judge(
    answers: Sequence[Answer],
    reward: CompositeReward,
    gold: RewardFunction,
    *,
    vader: bool,
    answer_pattern: str | None = None,
    accuracy: bool = True,
) -> list[Judged]:
    """Every judge scores every response; where a right answer is known, the response is right or not, in two readings.

    Args:
        answer_pattern: the form of a strictly right answer, see `right_in_form`.
        accuracy: whether right answers are texts to compare with, and not what a rule makes of them.
    """
    prompts = [answer.prompt.prompt for answer in answers]
    responses = [answer.response for answer in answers]
    proxy = reward(prompts, responses)
    truth = torch.as_tensor(gold(prompts, responses))
    if not torch.isfinite(truth).all():
        raise TrainingError("the gold judge gives a score that is not finite: retrain it with a lower learning_rate")
    sentiment = vader_scores(prompts, responses) if vader else [None] * len(answers)
    return [
        Judged(
            id=f"{answer.policy}/{answer.prompt.id}",
            policy=answer.policy,
            prompt_id=answer.prompt.id,
            prompt=answer.prompt.prompt,
            response=answer.response,
            tokens=answer.tokens,
            ended=answer.ended,
            kl=answer.kl,
            kl_k3=answer.kl_k3,
            proxy=proxy.total[row].item(),
            rewards={name: values[row].item() for name, values in proxy.components.items()},
            gold=truth[row].item(),
            vader=sentiment[row],
            correct=_correct(answer, answer_pattern) if accuracy else None,
            measures={name: values[row].item() for name, values in proxy.measures.items()},
        )
        for row, answer in enumerate(answers)
    ]


def _correct(answer: Answer, pattern: str | None) -> dict[str, bool] | None:
    expected = answer.prompt.answer
    if expected is None:
        return None
    strict, flexible = right_in_form(answer.response, expected, pattern), right_answer(answer.response, expected)
    return {"strict": bool(strict), "flexible": bool(flexible)}


def vader_scores(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """VADER's compound score of each prompt with its response, in [−1, 1]."""
    lexicon: Any = SentimentIntensityAnalyzer()
    texts = (prompt + response for prompt, response in zip(prompts, responses, strict=True))
    return [lexicon.polarity_scores(text)["compound"] for text in texts]
