"""Pairs of responses to label: written by the last run's policies, chosen at random or where reward models disagree."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor

from tasks.core.errors import ConfigError, DataError
from tasks.core.rows import Preference, Prompt, format_validation_error, read_rows
from tasks.data.cleaning import hash_uniform
from tasks.labelling.formats import read_text
from tasks.labelling.labels import VALUED_CHOICES, Question, question_error, question_id, text_error
from tasks.models.loading import policy_stages
from tasks.rewards.reward_model import RewardModel, member_folder
from tasks.rl.rollout import load_sampler, sample_in_batches

if TYPE_CHECKING:
    from tasks.config.training import GenerationParams

__all__ = [
    "PolicyResponse", "by_disagreement", "check_policies", "gold_questions", "load_ensemble_scores", "make_pairs",
    "make_ranking_pairs", "preference_variance", "sample_prompts", "sample_responses", "select_pairs", "with_overlap",
    "without_unkeepable",
]  # fmt: skip

CANDIDATES_PER_PAIR = 4
"""Pairs that are scored for each one that is chosen by disagreement."""

SAMPLES = 2
"""Of each policy to each prompt, so that one policy alone makes a pair."""

ONE_MEMBER = (
    "--by disagreement needs a reward model with at least two members: `rlhf run reward_model -S "
    "reward_model.ensemble_size=3`, or sample --by random"
)

Scores = Callable[[Sequence[str], Sequence[str]], Tensor]
"""(prompts, responses) → [K, B], as `tasks.rewards.reward_model.RewardModel.member_scores`."""


@dataclass(frozen=True)
class PolicyResponse:
    """A response and the policy that wrote it."""

    policy: str
    response: str


def select_pairs(
    artifacts: Path,
    generation: GenerationParams,
    policies: Sequence[str],
    split: str,
    count: int,
    by: str,
    *,
    seed: int,
    warn: Callable[[str], None],
) -> list[Question]:
    """Sample responses to prompts of the split, and choose pairs of them, `by` random, disagreement or ranking.

    Args:
        warn: called with the number of responses that no database keeps, and why; they are left out.
    """
    scores = load_ensemble_scores(artifacts) if by == "disagreement" else None
    policies = check_policies(policies, artifacts)
    candidates = count * CANDIDATES_PER_PAIR if scores else count
    spare = candidates // 8 + 4  # some prompts get the same response from every policy
    prompts = sample_prompts(artifacts, split, candidates + spare, seed=seed)
    responses = sample_responses(policies, prompts, generation, artifacts, seed=seed)
    responses, skipped = without_unkeepable(responses)
    for reason, number in sorted(skipped.items()):
        warn(f"{number} responses skipped: {reason}")
    make = make_ranking_pairs if by == "ranking" else make_pairs
    pairs = make(responses, candidates, least=count, seed=seed)
    return by_disagreement(pairs, count, scores) if scores else pairs


def check_policies(policies: Sequence[str], artifacts: Path) -> list[str]:
    """Return the policies, or all that the last run left where none are named.

    Raises:
        ConfigError: one is not there.
    """
    found = policy_stages(artifacts)
    if missing := [policy for policy in policies if policy not in found]:
        raise ConfigError(
            f"--from: no policy {', '.join(missing)} in {artifacts}; there are: {', '.join(found) or 'none'}"
        )
    if not found:
        raise ConfigError(f"no policy in {artifacts} to sample from: `rlhf run` first")
    return list(policies) or found


def sample_prompts(artifacts: Path, split: str, count: int, *, seed: int) -> list[str]:
    """Return up to so many prompts of the split, in an order that the seed fixes."""
    rows = read_rows(artifacts / "prepare" / "prompts" / f"{split}.jsonl", Prompt)
    random.Random(f"{seed}/{split}/ask").shuffle(rows)
    return [row.prompt for row in rows[:count]]


def sample_responses(
    policies: Sequence[str], prompts: Sequence[str], generation: GenerationParams, artifacts: Path, *, seed: int
) -> dict[str, list[PolicyResponse]]:
    """Map each prompt to the policies' responses; one policy at a time is in memory."""
    responses: dict[str, list[PolicyResponse]] = {prompt: [] for prompt in prompts}
    for policy in policies:
        sampler, generator = load_sampler(artifacts, policy, generation), torch.Generator().manual_seed(seed)
        for rollout in sample_in_batches(sampler, prompts, generator, samples_per_prompt=SAMPLES):
            for prompt, text in zip(rollout.prompt_texts, rollout.texts, strict=True):
                responses[prompt].append(PolicyResponse(policy, text))
    return responses


def without_unkeepable(
    responses: Mapping[str, Sequence[PolicyResponse]],
) -> tuple[dict[str, list[PolicyResponse]], Counter[str]]:
    """Return the responses without those that no database keeps, and how many those are for each reason.

    All responses to a prompt that no database keeps are left out.
    """
    kept: dict[str, list[PolicyResponse]] = {}
    skipped: Counter[str] = Counter()
    for prompt, own in responses.items():
        reasons = [text_error("prompt", prompt) or text_error("response", item.response) for item in own]
        kept[prompt] = [item for item, reason in zip(own, reasons, strict=True) if not reason]
        skipped.update(filter(None, reasons))
    return kept, skipped


def load_ensemble_scores(artifacts: Path) -> Scores:
    """Load the reward model, for each member's rewards.

    Raises:
        ConfigError: there are not several members.
    """
    stage = artifacts / "reward_model"
    if not member_folder(stage, 1).is_dir():
        raise ConfigError(ONE_MEMBER)
    return RewardModel.load(artifacts / "base_model", artifacts / "sft", stage).member_scores


def make_pairs(
    responses: Mapping[str, Sequence[PolicyResponse]], most: int, *, least: int, seed: int
) -> list[Question]:
    """Make up to `most` random pairs of different, non-empty responses: one of each prompt, then a second one, ….

    The pairs of a prompt depend on the seed, the prompt and the responses to it alone.

    Raises:
        DataError: there are fewer than `least`.
    """
    shuffled = [
        _shuffled_pairs(prompt, own, random.Random(f"{seed}/{prompt}/pairs")) for prompt, own in responses.items()
    ]
    pairs = [pair for round_ in zip_longest(*shuffled) for pair in round_ if pair is not None][:most]
    if len(pairs) < least:
        skipped = sum(not own for own in shuffled)
        raise DataError(
            f"there are {len(pairs)} pairs to choose from, not {least} ({skipped} prompts had one response that is not "
            "empty): ask for fewer with --pairs, or for responses of more policies with --from"
        )
    return pairs


def make_ranking_pairs(
    responses: Mapping[str, Sequence[PolicyResponse]], most: int, *, least: int, seed: int
) -> list[Question]:
    """Make up to `most` pairs of two policies each, all pairs of policies as often as they can be; one of each prompt.

    Raises:
        DataError: there is one policy, or there are fewer than `least` pairs.
    """
    matches = list(combinations(sorted({item.policy for own in responses.values() for item in own}), 2))
    if not matches:
        raise DataError("--by ranking compares policies, and there is one: name several with --from")
    counts, found = Counter(dict.fromkeys(matches, 0)), list[Question]()
    for prompt, own in responses.items():
        pairs = {
            match: pair
            for pair in _shuffled_pairs(prompt, own, random.Random(f"{seed}/{prompt}/pairs"))
            if (match := (min(pair.policy_a, pair.policy_b), max(pair.policy_a, pair.policy_b))) in counts
        }
        if pairs and len(found) < most:
            rarest = min(pairs, key=lambda match: (counts[match], match))
            counts[rarest] += 1
            found.append(replace(pairs[rarest], reason="ranking"))
    if len(found) < least:
        raise DataError(
            f"{len(found)} of {len(responses)} prompts have different responses of two policies, not {least}"
        )
    return found


def _shuffled_pairs(prompt: str, responses: Sequence[PolicyResponse], rng: random.Random) -> list[Question]:
    """Return all pairs of one prompt in random order, and in each a random one first."""
    different = {item.response.strip(): item for item in responses if item.response.strip()}
    possible = list(combinations(different.values(), 2))
    drawn = (rng.sample(pair, 2) for pair in rng.sample(possible, len(possible)))
    return [
        Question(
            question_id(prompt, a.response, b.response), prompt, a.response, b.response, a.policy, b.policy, "random"
        )
        for a, b in drawn
    ]


def by_disagreement(pairs: Sequence[Question], count: int, scores: Scores) -> list[Question]:
    """Return the pairs on whose preference the members of an ensemble disagree most; see `preference_variance`.

    Raises:
        ConfigError: there is one member, which agrees with itself.
    """
    prompts = [pair.prompt for pair in pairs]
    one = scores(prompts, [pair.response_a for pair in pairs])
    other = scores(prompts, [pair.response_b for pair in pairs])
    if len(one) < 2:
        raise ConfigError(f"{ONE_MEMBER} (there is one)")
    disputed = [
        replace(pair, reason="disagreement", priority=round(value, 6))
        for pair, value in zip(pairs, preference_variance(one, other).tolist(), strict=True)
    ]
    return sorted(disputed, key=lambda pair: (-pair.priority, pair.id))[:count]


def preference_variance(one: Tensor, other: Tensor) -> Tensor:
    """Return the members' variance of σ(r_a − r_b), the probability that a is preferred: rewards [K, B] → [B].

    Sources: Christiano et al. 2017, arXiv 1706.03741, section 2.2.4 (ask where an ensemble's predictions vary most);
    Gleave and Irving 2022, arXiv 2203.07472 (that this helps only as far as members err independently).
    """
    return torch.sigmoid(one - other).var(0, correction=0)


def with_overlap(pairs: Sequence[Question], share: float, *, seed: int) -> list[Question]:
    """Let two people label about this share of the pairs; which ones depends on each pair and the seed alone."""
    return [replace(pair, labels_wanted=2) if hash_uniform(pair.id, seed, "twice") < share else pair for pair in pairs]


def gold_questions(path: Path, *, min_margin: float, count: int) -> list[Question]:
    """Read questions whose answer is known from a file of JSON Lines, those of the largest margin first.

    A line is `{prompt, response_a, response_b, gold}`, or a preference: it is a question where its margin is at least
    `min_margin`, and which side stands first depends on its texts.

    Raises:
        DataError: the file is missing, a line is neither, or no line is left.
    """
    lines = enumerate(read_text(path).split("\n"), start=1)  # a text may hold other line ends
    found = [_read_gold(line, f"{path}:{number}") for number, line in lines if line.strip()]
    clear = sorted((pair for pair in found if pair[0] >= min_margin), key=lambda pair: (-pair[0], pair[1].id))
    if not clear:
        raise DataError(f"{path}: no line of {len(found)} has a margin of {min_margin:g} or more; lower --gold-margin")
    return [question for _, question in clear[:count]]


def _read_gold(line: str, where: str) -> tuple[float, Question]:
    """Return a question with a known answer and its margin, infinite where the file states the answer itself."""
    try:
        content: dict[str, Any] = json.loads(line)
        if "gold" in content:
            margin, question = math.inf, _stated_gold(content)
        else:
            row = Preference.model_validate(content)
            margin, question = -math.inf if row.margin is None else row.margin, _preference_gold(row)
    except ValidationError as error:
        raise DataError(
            f"{where}: neither a question with its `gold` answer nor a preference: {format_validation_error(error)}"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{where}: not a question with its answer: {str(error)[:200]}") from None
    if reason := question_error(question):
        raise DataError(f"{where}: {reason}")
    return margin, question


def _stated_gold(content: Mapping[str, Any]) -> Question:
    prompt, one, other, gold = (str(content[key]) for key in ("prompt", "response_a", "response_b", "gold"))
    if gold not in VALUED_CHOICES:
        raise ValueError(f"gold is {gold!r}, and should be a, b, tie or both_bad")
    if one == other:
        raise ValueError("response_a and response_b are the same text")
    return Question(question_id(prompt, one, other), prompt, one, other, "unknown", "unknown", "gold", gold)


def _preference_gold(row: Preference) -> Question:
    first = int(question_id(row.prompt, row.chosen, row.rejected)[-1], 16) % 2 == 0
    one, other = (row.chosen, row.rejected) if first else (row.rejected, row.chosen)
    return _stated_gold({"prompt": row.prompt, "response_a": one, "response_b": other, "gold": "a" if first else "b"})
