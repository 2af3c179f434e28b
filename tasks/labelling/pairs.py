"""Which pairs of responses to ask people about."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from tasks.core.errors import ConfigError, DataError
from tasks.core.rows import Preference, format_validation_error
from tasks.data.splitting import hash_uniform
from tasks.labelling.labels import Question, question_flaw, question_id
from tasks.labelling.tables import OPINIONS

__all__ = ["Pool", "Written", "asked_twice", "at_random", "by_disagreement", "gold_questions", "paired", "variance"]

Scores = Callable[[Sequence[str], Sequence[str]], Tensor]
"""(prompts, responses) → [K, B], as `tasks.rewards.reward_model.RewardModel.members`."""


@dataclass(frozen=True)
class Written:
    """A response and the policy that wrote it."""

    policy: str
    response: str


@dataclass(frozen=True)
class Pool:
    """Pairs that could be asked, prompt by prompt, and how many prompts gave none, their responses being all alike."""

    pairs: list[Question]
    alike: int


def paired(written: Mapping[str, Sequence[Written]], count: int, *, seed: int) -> Pool:
    """Up to `count` random pairs of different, non-empty responses: one of each prompt, then a second one of each, ….

    The pairs of a prompt depend on the seed, the prompt and the responses to it alone. Which of two stands first is
    random too.
    """
    drawn = [
        _drawn(prompt, responses, random.Random(f"{seed}/{prompt}/pairs")) for prompt, responses in written.items()
    ]
    rounds = [pair for round_ in zip_longest(*drawn) for pair in round_ if pair is not None]
    return Pool(rounds[:count], sum(not pairs for pairs in drawn))


def _drawn(prompt: str, responses: Sequence[Written], rng: random.Random) -> list[Question]:
    """All pairs of one prompt, in random order."""
    different = {item.response.strip(): item for item in responses if item.response.strip()}
    possible = list(combinations(different.values(), 2))
    return [_question(prompt, *rng.sample(pair, 2)) for pair in rng.sample(possible, len(possible))]


def _question(prompt: str, one: Written, other: Written) -> Question:
    name = question_id(prompt, one.response, other.response)
    return Question(name, prompt, one.response, other.response, one.policy, other.policy, "random")


def at_random(pool: Pool, count: int) -> list[Question]:
    """So many pairs of the pool, which are random already.

    Raises:
        DataError: it holds fewer.
    """
    _check(pool, count)
    return pool.pairs[:count]


def by_disagreement(pool: Pool, count: int, scores: Scores) -> list[Question]:
    """The pairs whose preference the members of an ensemble disagree on most; see `variance`.

    Raises:
        ConfigError: there is one member, which agrees with itself.
        DataError: the pool holds fewer pairs.
    """
    _check(pool, count)
    prompts = [pair.prompt for pair in pool.pairs]
    one, other = (
        scores(prompts, [getattr(pair, side) for pair in pool.pairs]) for side in ("response_a", "response_b")
    )
    if len(one) < 2:
        raise ConfigError(
            "--by disagreement needs a reward model with at least two members, and there is one: "
            "`rlhf run reward_model -S reward_model.members=3`, or ask --by random"
        )
    disputed = [
        replace(pair, reason="disagreement", priority=round(value, 6))
        for pair, value in zip(pool.pairs, variance(one, other).tolist(), strict=True)
    ]
    return sorted(disputed, key=lambda pair: (-pair.priority, pair.id))[:count]


def variance(one: Tensor, other: Tensor) -> Tensor:
    """Variance over members of σ(r_a − r_b), the probability by each that a is preferred: rewards [K, B] → [B].

    Sources: Christiano et al. 2017, arXiv 1706.03741, section 2.2.4 (ask where an ensemble's predictions vary most);
    Gleave and Irving 2022, arXiv 2203.07472 (that this helps only as far as members err independently).
    """
    return torch.sigmoid(one - other).var(0, correction=0)


def asked_twice(pairs: Sequence[Question], share: float, *, seed: int) -> list[Question]:
    """Let two people label about this share of the pairs; which ones depends on each pair and the seed alone."""
    return [replace(pair, labels_wanted=2) if hash_uniform(pair.id, seed, "twice") < share else pair for pair in pairs]


def gold_questions(path: Path, *, min_margin: float, count: int) -> list[Question]:
    """Questions whose answer is known, from a file of JSON Lines, those of the largest margin first.

    A line is `{prompt, response_a, response_b, gold}`, or a preference: it is a question where its margin is at least
    `min_margin`, and which side stands first depends on its texts.

    Raises:
        DataError: the file is missing, a line is neither, or no line is left.
    """
    if not path.is_file():
        raise DataError(
            f"{path} does not exist: --gold names a file of questions with their answers, or of preferences"
        )
    lines = enumerate(path.read_text(encoding="utf-8").split("\n"), start=1)  # a text may hold other line ends
    found = [_gold(json_line, f"{path}:{number}") for number, json_line in lines if json_line.strip()]
    clear = sorted((pair for pair in found if pair[0] >= min_margin), key=lambda pair: (-pair[0], pair[1].id))
    if not clear:
        raise DataError(f"{path}: no line of {len(found)} has a margin of {min_margin:g} or more; lower --gold-margin")
    return [question for _, question in clear[:count]]


def _gold(line: str, where: str) -> tuple[float, Question]:
    margin, question = _read_gold(line, where)
    if reason := question_flaw(question):
        raise DataError(f"{where}: {reason}")
    return margin, question


def _read_gold(line: str, where: str) -> tuple[float, Question]:
    try:
        content: dict[str, Any] = json.loads(line)
        if "gold" in content:
            return float("inf"), _written_gold(content)
        row = Preference.model_validate(content)
    except ValidationError as error:
        raise DataError(
            f"{where}: neither a question with its `gold` answer nor a preference: {format_validation_error(error)}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: not a question with its answer: {error}") from None
    name = question_id(row.prompt, row.chosen, row.rejected)
    first = int(name[-1], 16) % 2 == 0
    sides = (row.chosen, row.rejected) if first else (row.rejected, row.chosen)
    gold = "a" if first else "b"
    margin = row.margin if row.margin is not None else float("-inf")
    return margin, Question(name, row.prompt, *sides, "unknown", "unknown", "gold", gold)


def _written_gold(content: Mapping[str, Any]) -> Question:
    prompt, one, other, gold = (str(content[key]) for key in ("prompt", "response_a", "response_b", "gold"))
    if gold not in OPINIONS:
        raise ValueError(f"gold is {gold!r}, and should be a, b, tie or both_bad")
    if one == other:
        raise ValueError("response_a and response_b are the same text")
    return Question(question_id(prompt, one, other), prompt, one, other, "unknown", "unknown", "gold", gold)


def _check(pool: Pool, count: int) -> None:
    if len(pool.pairs) < count:
        raise DataError(
            f"there are {len(pool.pairs)} pairs to choose from, not {count} ({pool.alike} prompts had one response "
            "that is not empty): ask for fewer with --pairs, or for responses of more policies with --from"
        )
