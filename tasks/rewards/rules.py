"""Rewards that are plain functions of the text: nothing learned, so nothing to over-fit, but each can be gamed.

Each rule says how a policy could earn it without earning what it stands for, and what stands against that. All of
them see the response without its end token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import TypeAlias

from torch import Tensor

from tasks.core.errors import ConfigError, DataError
from tasks.core.sections.reward import RewardParams
from tasks.core.words import repeated_share, words
from tasks.rewards.code import code_reward

__all__ = [
    "RULES",
    "Answers",
    "RewardFunction",
    "RuleFactory",
    "length",
    "repetition",
    "right_answer",
    "right_in_form",
]

RewardFunction: TypeAlias = Callable[[list[str], list[str]], Sequence[float] | Tensor]
"""(prompts [B], responses [B]) → one value per response [B]; `prompt + response` is the whole text."""

Answers: TypeAlias = Mapping[str, str]
"""Prompt → its right answer, for the prompts that have one."""

RuleFactory: TypeAlias = Callable[[RewardParams, Answers], RewardFunction]
"""Makes a rule from the `reward` section of params.yaml and what is known about the prompts."""

NUMBER = re.compile(r"[-−+]?\d[\d,]*(?:\.\d+)?")


def length(response: str, *, target: int, tolerance: int) -> float:
    """1 at `target` words, falling linearly to 0 at `tolerance` words away from it, and 0 beyond; in [0, 1].

    Gamed by: padding with empty words up to the target, or stopping there in the middle of a sentence.
    Against that: a repetition weight, the KL penalty (padding is unlikely text under the reference), and a tolerance
    so wide that one word more or less is worth little. Watch the share without an end token beside it.
    """
    return max(0.0, 1 - abs(len(words(response)) - target) / tolerance)


def repetition(response: str) -> float:
    """Minus the share of word pairs that already occurred in the response, in (−1, 0].

    Why pairs: `REPEATED_NGRAM`. A response of up to two words has no two pairs and gets 0; so does an empty one.

    Gamed by: very short responses, signs instead of words, and the same thing said in ever new words, which no n-gram
    sees. Against that: a length weight, the learned component (people dislike a sentence that goes nowhere) and the
    KL penalty. Varying punctuation or letter case does not help: neither is part of a word here.
    """
    return 0.0 - repeated_share(response)  # not −share: no −0.0 in the files


def right_answer(response: str, expected: str) -> float:
    """1 if the response's last number equals the expected one in value, else 0; where a word is expected, the response.

    Numbers may carry thousands separators and a sign; words are compared without case and surrounding white space.

    Gamed by: nothing that reads the last number alone can be earned by naming many, but a right number after wrong
    reasoning is paid in full. Against that: read the samples; the KL penalty keeps the reasoning near people's.
    """
    if not NUMBER.fullmatch(expected.strip()):
        return float(_same(response, expected))
    found = NUMBER.findall(response)
    return float(bool(found) and _same(found[-1], expected))


def right_in_form(response: str, expected: str, pattern: str | None) -> float:
    """1 if the response gives the expected answer in the demanded form, else 0: what lm-eval calls `strict-match`.

    Where the pattern matches first, its group is the answer (lm-eval 0.4.13, tasks/gsm8k/gsm8k.yaml, whose pattern is
    `#### (\\-?[0-9\\.\\,]+)`); without a pattern the whole response is, but for white space around it. Compared as in
    `right_answer`; a full stop after a number does not count.

    Gamed by: giving the form again and again does not help, for the first counts. Otherwise as `right_answer`.
    """
    if pattern is None:
        return float(_same(response, expected))
    found = re.search(pattern, response)
    return float(found is not None and _same(found[1] or "", expected))


def _same(answer: str, expected: str) -> bool:
    """Whether two answers are one: numbers in value, anything else letter by letter, without case."""
    answer, expected = answer.strip(), expected.strip()
    if not NUMBER.fullmatch(expected):
        return answer.casefold() == expected.casefold()
    number = answer.removesuffix(".")
    return NUMBER.fullmatch(number) is not None and _value(number) == _value(expected)


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", "").replace("−", "-"))


def _answer_rule(_params: RewardParams, answers: Answers) -> RewardFunction:
    def score(prompts: list[str], responses: list[str]) -> list[float]:
        if missing := [prompt for prompt in prompts if prompt not in answers]:
            raise DataError(
                f"reward.weights.answer: no right answer is known for the prompt {missing[0][:200]!r}; give its rows "
                "an `answer`, or remove the weight"
            )
        return [right_answer(response, answers[prompt]) for prompt, response in zip(prompts, responses, strict=True)]

    return score


def _code_rule(params: RewardParams, answers: Answers) -> RewardFunction:
    if params.code is None:
        raise ConfigError(
            "reward.weights.code: the component needs its section; add `reward.code: {}` for the defaults"
        )
    return code_reward(params.code, answers)


def _length_rule(params: RewardParams, _answers: Answers) -> RewardFunction:
    rule = params.length
    return lambda _prompts, responses: [
        length(response, target=rule.target, tolerance=rule.tolerance) for response in responses
    ]


def _repetition_rule(_params: RewardParams, _answers: Answers) -> RewardFunction:
    return lambda _prompts, responses: [repetition(response) for response in responses]


RULES: Mapping[str, RuleFactory] = {
    "answer": _answer_rule, "code": _code_rule, "length": _length_rule, "repetition": _repetition_rule,
}  # fmt: skip
"""Component name, as in `reward.weights` of params.yaml → how to make it. A new rule is one more line here."""
