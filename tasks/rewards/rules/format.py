"""Rewards for the form of a response: a pattern, a JSON schema, verifiable instructions as in IFEval."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

from tasks.core.text_stats import search_pattern, tokenize_words
from tasks.rewards.rules.base import Answers, PerSampleRule
from tasks.rewards.rules.style import count_sentences

if TYPE_CHECKING:
    from tasks.config.rules import InstructionsRule, JsonSchemaRule

__all__ = ["instructions_rule", "json_schema_rule", "matches_pattern"]

BULLET = re.compile(r"^[^\S\n]*[*-] +\S", re.MULTILINE)
PARAGRAPHS = re.compile(r"\n\s*\n")


def matches_pattern(response: str, *, pattern: str, match: str) -> float:
    """1 if the stripped response matches the pattern (`whole`) or contains a match (`contains`), else 0.

    Gamed by: the format with nothing in it (`<answer></answer>`), and with `contains` by anything around it. Against
    that: a pattern that asks for content (`.{20,}`), and a component that reads the content; as a gate
    (`reward.gates`) the form is a condition, and earns nothing by itself.

    Raises:
        TimeoutError: nested repetition (`(a|aa)+`) would take for ever on this text; counted as a failure of the rule.
    """
    return float(search_pattern(pattern, response.strip(), whole=match == "whole") is not None)


def json_schema_rule(options: JsonSchemaRule, _answers: Answers) -> PerSampleRule:
    """1 if the response is one JSON value that fits the schema, else 0; nothing may stand around it.

    Gamed by: the least that fits: `{}` where nothing is required, empty strings, one constant object for every prompt.
    Against that: `required`, `minLength`, `enum`, `additionalProperties: false` in the schema, and a component that
    reads the content. NaN and Infinity do not count as JSON.

    Raises:
        TimeoutError: nested repetition in a `pattern` would take for ever; counted as a failure of the rule.
    """
    validator = _Validator(options.json_schema, format_checker=Draft202012Validator.FORMAT_CHECKER)

    def score(_prompt: str, response: str) -> float:
        try:
            value: Any = json.loads(response, parse_constant=int)  # no int is called NaN: a ValueError
            return float(validator.is_valid(value))
        except (ValueError, RecursionError):
            return 0.0

    return PerSampleRule(score)


def _check_pattern(validator: Any, pattern: str, value: Any, _schema: Any) -> Iterator[ValidationError]:
    if validator.is_type(value, "string") and not search_pattern(pattern, value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


_Validator: Any = extend(Draft202012Validator, {"pattern": _check_pattern})  # jsonschema's own has no time limit


def instructions_rule(options: InstructionsRule, _answers: Answers) -> PerSampleRule:
    """Share of the constraints that hold, in [0, 1]; 0 for a response without a word.

    Zhou et al. 2023 (arXiv 2311.07911), table 1: the kinds that need no other package, in their strict reading.

    Gamed by: text that keeps every constraint and says nothing (keywords in a list, a paragraph of one word). Against
    that: bounds from below beside those from above, and a learned component or the KL penalty, which read the rest.
    """

    def score(_prompt: str, response: str) -> float:
        held = list(check_constraints(response, options))
        return sum(held) / len(held) if tokenize_words(response) else 0.0

    return PerSampleRule(score)


def check_constraints(response: str, options: InstructionsRule) -> Iterator[bool]:
    """Check each constraint that is set, in the order of the options."""
    counts = {
        "words": len(tokenize_words(response)),
        "sentences": count_sentences(response),
        "paragraphs": sum(bool(part.strip()) for part in PARAGRAPHS.split(response)),
        "bullets": len(BULLET.findall(response)),
    }
    for what, count in counts.items():
        if (least := getattr(options, f"min_{what}")) is not None:
            yield count >= least
        if (most := getattr(options, f"max_{what}")) is not None:
            yield count <= most
    yield from (_contains_phrase(response, phrase) for phrase in options.contains)
    yield from (not _contains_phrase(response, phrase) for phrase in options.avoids)
    if options.ends_with:
        yield response.strip().casefold().endswith(options.ends_with.strip().casefold())
    if options.case:
        yield response == (response.lower() if options.case == "lower" else response.upper())
    if not options.commas:
        yield "," not in response


def _contains_phrase(text: str, phrase: str) -> bool:
    """Whether the text contains the phrase as whole words, in any letter case."""
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None
