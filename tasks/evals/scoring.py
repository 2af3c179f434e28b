"""Sampling of policies on the same prompts and seed, and scoring of the responses by every judge."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from tasks.config.base import ENVIRONMENT
from tasks.core.errors import DataError, TrainingError
from tasks.core.rows import Prompt, Rating, read_rows
from tasks.core.terminal import Progress
from tasks.evals.compare import BEST_OF_N, HUMAN, NULL, REFERENCE, ScoredResponse
from tasks.evals.overoptimisation import best_of_n_kl
from tasks.models.encoding import encode_response
from tasks.models.loading import is_disabled
from tasks.rewards.composition import CompositeReward, RewardBatch, rule_component
from tasks.rewards.reward_model import load_gold_judge
from tasks.rewards.rules.answers import exact_match, strict_match
from tasks.rewards.rules.base import Component, RewardFunction
from tasks.rl.advantages import discount_by_turns
from tasks.rl.kl import kl_estimates, per_sequence
from tasks.rl.multi_turn import EnvironmentReward, MultiTurnRollout, with_environment
from tasks.rl.policy import Policy
from tasks.rl.rollout import LocalSampler, Rollout, derive_generator

if TYPE_CHECKING:
    from tasks.config.rules import RuleOptions
    from tasks.config.training import EnvironmentParams, GenerationParams

__all__ = [
    "PolicySampler", "SampledResponse", "answer_accuracy", "best_of_n_draws", "human_responses", "load_gold_reward",
    "sample_prompts", "score_responses", "split_null", "vader_scores",
]  # fmt: skip

GREEDY = 1e-6
"""Temperature at which sampling is greedy decoding: all probability is on the largest logit."""


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
    kl: float | None
    kl_k3: float | None
    draw: int = 0
    conversation: str | None = None
    environment_reward: float | None = None
    turns: int = 1
    turn_discount: float = 1.0


class PolicySampler:
    """Sampler of responses or multi-turn conversations for several policies, each with random numbers of its own.

    They follow from the seed and the policy's name, so no two policies share theirs.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        generation: GenerationParams,
        *,
        batch_size: int,
        seed: int,
        load_beside: Callable[[Any], Any],
        environment: EnvironmentParams | None = None,
    ) -> None:
        """Keep the settings.

        Args:
            batch_size: sequences, each prompt as many as it has draws.
            load_beside: loads the reference of a policy; None of one that is an adapter on it.
        """
        self._tokenizer, self._generation, self._seed, self._environment = tokenizer, generation, seed, environment
        self._prompts, self._batch_size, self._load_beside = prompts, batch_size, load_beside

    def sample(
        self, name: str, model: Any, *, samples_per_prompt: int = 1, reference: Any = None, greedy: bool = False
    ) -> list[SampledResponse]:
        """Sample responses prompt by prompt, with their KL to the reference.

        Args:
            reference: if it is another than the policy's own; that of the policy REFERENCE is itself.
            greedy: decode greedily; the KL then says nothing.
        """
        temperature = GREEDY if greedy else self._generation.temperature
        generation = self._generation.model_copy(update={"temperature": temperature})
        sampler = with_environment(LocalSampler(model, self._tokenizer, generation), self._environment)
        policy = None
        if not (greedy or name == REFERENCE):
            beside = self._load_beside(model) if reference is None else reference
            policy = Policy(model, temperature=temperature, value_head=False, reference=beside)
        generator = derive_generator(self._seed, *name.encode())
        answers: list[SampledResponse] = []
        size = max(1, self._batch_size // samples_per_prompt)
        batches = [self._prompts[start : start + size] for start in range(0, len(self._prompts), size)]
        progress = Progress(f"answers of {name}", len(batches), "batch")
        for number, prompts in enumerate(batches):
            if self._environment:  # each turn derives its numbers from a generator's seed
                generator = derive_generator(self._seed, *name.encode(), number)
            rollout = sampler.sample(prompts, generator, samples_per_prompt=samples_per_prompt)
            rows = [row for row in prompts for _ in range(samples_per_prompt)]
            logprobs = policy.reference_logprobs(rollout) if policy else rollout.logprobs
            found = self._to_responses(name, rows, rollout, logprobs)
            answers += [replace(answer, draw=row % samples_per_prompt) for row, answer in enumerate(found)]
            progress.update(number + 1)
        progress.close()
        return answers

    def sample_each(
        self, policies: Mapping[str, Callable[[], Any]], *, samples_per_prompt: int = 1, greedy: bool = False
    ) -> list[SampledResponse]:
        """Sample responses of each policy, loaded one after another; the names are free."""
        answers: list[SampledResponse] = []
        for name, load in policies.items():
            gc.collect()  # the previous policy is in reference cycles
            answers += self.sample(name, load(), samples_per_prompt=samples_per_prompt, greedy=greedy)
        return answers

    def _to_responses(
        self, name: str, prompts: Sequence[Prompt], rollout: Rollout, reference_logprobs: Tensor
    ) -> list[SampledResponse]:
        mask = rollout.response_mask
        kl = kl_estimates(rollout.logprobs, reference_logprobs, mask)
        columns = zip(
            prompts, rollout.texts, mask.sum(1).tolist(), rollout.has_eos.tolist(),
            per_sequence(kl.k1, mask).tolist(), per_sequence(kl.k3, mask).tolist(), strict=True,
        )  # fmt: skip
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


def split_null(answers: Sequence[SampledResponse], draws: int) -> list[SampledResponse]:
    """Leave the first `draws` draws of each prompt to the reference; those after them become the null's."""
    return [
        replace(answer, policy=NULL, draw=answer.draw - draws)
        if answer.policy == REFERENCE and answer.draw >= draws
        else answer
        for answer in answers
    ]


def best_of_n_draws(null: Sequence[ScoredResponse], n: int) -> list[ScoredResponse]:
    """Of every n draws of the null for a prompt the one that the proxy scores highest, with the analytic KL.

    Args:
        null: prompt by prompt, each with n draws or a multiple.
    """
    kl, chosen = best_of_n_kl(n), list[ScoredResponse]()
    for start in range(0, len(null), n):
        best, draw = max(null[start : start + n], key=lambda record: record.proxy), null[start].draw // n
        values = {"id": f"{BEST_OF_N}/{best.prompt_id}/{draw}", "policy": BEST_OF_N, "draw": draw}
        chosen.append(best.model_copy(update=values | {"kl": kl, "kl_k3": kl}))
    return chosen


def human_responses(prompts: Sequence[Prompt], ratings: Path, tokenizer: Any) -> list[SampledResponse]:
    """What a person wrote after each prompt that is the beginning of a rated text, whose id it has."""
    files = [path for path in sorted(ratings.glob("*/test.jsonl")) if path.stat().st_size]
    texts = {row.id: row.text for path in files for row in read_rows(path, Rating)}
    found = [(row, texts[row.id].removeprefix(row.prompt)) for row in prompts if row.id in texts]
    return [
        SampledResponse(HUMAN, row, text, len(encode_response(tokenizer, text)), ended=True, kl=None, kl_k3=None)
        for row, text in found
    ]


def load_gold_reward(
    prompts: Sequence[Prompt], base_model: Path, gold_judge: Path, rule: RuleOptions | None = None
) -> RewardFunction:
    """Load the gold reward: a model of human ratings that training never saw, a rule, or the right answers.

    Raises:
        DataError: none of them is available.
    """
    if not is_disabled(gold_judge):
        return load_gold_judge(base_model, gold_judge)
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
    reward: CompositeReward | None,
    gold_reward: RewardFunction | None,
    *,
    vader: bool,
    answer_pattern: str | None = None,
    accuracy: bool = True,
) -> list[ScoredResponse]:
    """Score every response by every judge, and its accuracy, strict and flexible, if the right answer is known.

    Args:
        reward: None if nobody asks for the proxy's scores, which are then NaN.
        gold_reward: None if an environment judged: then its reward is the gold score.
        answer_pattern: see `strict_match`.
        accuracy: whether right answers are texts to compare with, and not input of a rule.
    """
    prompts, responses = [answer.prompt.prompt for answer in answers], [answer.response for answer in answers]
    external: dict[str, Component] = {}
    if gold_reward is None:
        gold_scores = torch.tensor([answer.environment_reward or 0.0 for answer in answers])
        external[ENVIRONMENT] = EnvironmentReward(gold_scores, torch.tensor([answer.turns for answer in answers]))
    else:
        gold_scores = torch.as_tensor(gold_reward(prompts, responses))
    proxy = RewardBatch(torch.full((len(answers),), math.nan), {})
    if reward is not None:
        proxy = reward(prompts, responses, external=external)
    if not torch.isfinite(gold_scores).all():
        raise TrainingError("the gold judge gives a score that is not finite: retrain it with a lower learning_rate")
    sentiment = vader_scores(prompts, responses) if vader else [None] * len(answers)
    return [
        ScoredResponse(
            id=f"{answer.policy}/{answer.prompt.id}/{answer.draw}",
            policy=answer.policy, prompt_id=answer.prompt.id, draw=answer.draw, prompt=answer.prompt.prompt,
            response=answer.response, tokens=answer.tokens, ended=answer.ended, kl=answer.kl, kl_k3=answer.kl_k3,
            proxy=proxy.total[row].item() * answer.turn_discount,
            rewards={name: values[row].item() for name, values in proxy.components.items()},
            gold=gold_scores[row].item(), vader=sentiment[row], conversation=answer.conversation,
            correct=answer_accuracy(answer, answer_pattern) if accuracy else None,
            metrics={name: values[row].item() for name, values in proxy.metrics.items()},
        )
        for row, answer in enumerate(answers)
    ]  # fmt: skip


def answer_accuracy(answer: SampledResponse, pattern: str | None) -> dict[str, bool] | None:
    """Whether the response gives the right answer, strict and flexible; None where it is not known."""
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
