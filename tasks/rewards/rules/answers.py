"""Rewards for right answers: exact match, strict match of a format, and contained facts."""

from __future__ import annotations

import json
import re
import string
from decimal import Decimal
from typing import TYPE_CHECKING

from tasks.core.errors import DataError
from tasks.core.text_stats import search_pattern, tokenize_words
from tasks.rewards.rules.base import Answers, PerSampleRule

if TYPE_CHECKING:
    from tasks.config.rules import ContainsFactsRule, RuleOptions

__all__ = ["answer_rule", "contains_facts_rule", "exact_match", "require_answer", "strict_match"]

NUMBER = re.compile(r"(?:(?<![\w.)\]])[-−+][$€£]?)?(?:\d[\d,]*(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE][-+]?\d{1,4}\b)?")
"""`-3`, `1,234.5`, `.5`, `-$5`, `1e5`; a minus between two things (`3-5`, `x-5`) is no sign.

It misreads a list without spaces (`1,2,3` is 123) and a unit's exponent (`5 m2` is the number 2).
"""

SYMBOLS = str.maketrans({",": None, "$": None, "€": None, "£": None, "−": "-"})  # which `Decimal` does not parse
ARTICLES = re.compile(r"\b(a|an|the)\b")


def exact_match(response: str, expected: str) -> float:
    """1 if the response's last number equals the expected one in value, else 0; where a word is expected, the response.

    Words are compared without case and surrounding white space. What `NUMBER` misreads is misread here.

    Gamed by: a right number after wrong reasoning, which earns 1; naming many numbers does not help. Against that: read
    the samples; the KL penalty keeps the reasoning near people's.
    """
    if not NUMBER.fullmatch(expected.strip()):
        return float(_answers_equal(response, expected))
    found = NUMBER.findall(response)
    return float(bool(found) and _answers_equal(found[-1], expected))


def strict_match(response: str, expected: str, pattern: str | None) -> float:
    """1 if the response gives the expected answer in the required format, else 0 (lm-eval's `strict-match`).

    Where the pattern matches first, its group is the answer (lm-eval 0.4.13, tasks/gsm8k/gsm8k.yaml, whose pattern is
    `#### (\\-?[0-9\\.\\,]+)`); without a pattern the whole response is. Compared as in `exact_match`; a full stop after
    a number does not count. A pattern that takes too long on a response does not match it.

    Gamed by: as `exact_match`; giving the form again and again does not help, for the first counts.
    """
    if pattern is None:
        return float(_answers_equal(response, expected))
    try:
        found = search_pattern(pattern, response)
    except TimeoutError:
        return 0.0
    return float(found is not None and _answers_equal(found[1] or "", expected))


def _answers_equal(answer: str, expected: str) -> bool:
    """Compare two answers: numbers by value, other text without case."""
    answer, expected = answer.strip(), expected.strip()
    if not NUMBER.fullmatch(expected):
        return answer.casefold() == expected.casefold()
    candidate = answer.removesuffix(".")
    if not NUMBER.fullmatch(candidate):
        return False
    return Decimal(candidate.translate(SYMBOLS)) == Decimal(expected.translate(SYMBOLS))


def contains_facts_rule(options: ContainsFactsRule, answers: Answers) -> PerSampleRule:
    """Fraction of the facts of the row's answer that the response contains, reduced where it has many words; in [0, 1].

    Both are normalised as SQuAD 1.1's evaluation does (Rajpurkar et al. 2016, arXiv 1606.05250, section 6: no
    punctuation, no articles, lower case); a fact is named where its words stand in a row. Beyond `max_words` words the
    share is multiplied by max_words / words.

    Gamed by: naming every candidate there is, and naming a fact in order to deny it. Against that: `max_words`, which
    makes each further candidate cost; a learned component or the KL penalty against lists; read the samples.

    Raises:
        DataError: an answer is no list of facts.
    """
    facts = {answer: _parse_references(answer) for answer in answers.values()}

    def score(prompt: str, response: str) -> float:
        text, names = f" {_normalise_answer(response)} ", facts[require_answer("contains_facts", prompt, answers)]
        share = sum(f" {name} " in text for name in names) / len(names)
        return share * min(1.0, options.max_words / max(1, len(tokenize_words(response))))

    return PerSampleRule(score)


def _normalise_answer(text: str) -> str:
    """`normalize_answer` of SQuAD's evaluate-v1.1.py."""
    without_punctuation = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(ARTICLES.sub(" ", without_punctuation).split())


def _parse_references(answer: str) -> list[str]:
    """Parse the strings of a JSON list, or those between `|`, and normalise them."""
    try:
        parsed = list(map(str, json.loads(answer))) if answer.lstrip().startswith("[") else answer.split("|")
    except json.JSONDecodeError as error:
        raise DataError(f"the facts {answer[:200]!r} begin like a JSON list and are none: {error}") from error
    references = [_normalise_answer(item) for item in parsed]
    if not references or not all(references):
        raise DataError(f"the facts {answer[:200]!r} have an empty one: write them as a JSON list, or with | between")
    return references


def require_answer(rule: str, prompt: str, answers: Answers) -> str:
    """Look up the right answer of a prompt.

    Raises:
        DataError: there is none.
    """
    if prompt not in answers:
        raise DataError(
            f"reward.weights.{rule}: no right answer is known for the prompt {prompt[:200]!r}; give its rows an "
            "`answer`, or remove the weight"
        )
    return answers[prompt]


def answer_rule(_options: RuleOptions, answers: Answers) -> PerSampleRule:
    """Pays `exact_match`."""
    return PerSampleRule(lambda prompt, response: exact_match(response, require_answer("answer", prompt, answers)))
