"""Rewards for the format of a response: a pattern, a JSON schema."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NoReturn

from jsonschema import Draft202012Validator

from tasks.rewards.rules.base import Answers, PerSampleRule

if TYPE_CHECKING:
    from tasks.config.rules import JsonSchemaRule

__all__ = ["json_schema_rule", "matches_pattern"]


def matches_pattern(response: str, *, pattern: str, match: str) -> float:
    """1 if the stripped response matches the pattern (`whole`) or contains a match (`contains`), else 0.

    Gamed by: the format with nothing in it (`<answer></answer>`), and with `contains` by anything around it. Against
    that: a pattern that asks for content (`.{20,}`), and a component that reads the content; as a gate
    (`reward.gates`) the form is a condition, and earns nothing by itself. Write patterns without nested repetition
    (`(a+)+`): they take for ever on some texts.
    """
    text = response.strip()
    found = re.fullmatch(pattern, text) if match == "whole" else re.search(pattern, text)
    return float(found is not None)


def json_schema_rule(options: JsonSchemaRule, _answers: Answers) -> PerSampleRule:
    """1 if the response is one JSON value that fits the schema, else 0; nothing may stand around it.

    Gamed by: the least that fits: `{}` where nothing is required, empty strings, one constant object for every prompt.
    Against that: `required`, `minLength`, `enum`, `additionalProperties: false` in the schema, and a component that
    reads the content. NaN and Infinity, which Python reads and JSON does not know, do not count as JSON.
    """
    validator = Draft202012Validator(options.json_schema, format_checker=Draft202012Validator.FORMAT_CHECKER)

    def score(_prompt: str, response: str) -> float:
        try:
            value: Any = json.loads(response, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return 0.0
        return float(validator.is_valid(value))

    return PerSampleRule(score)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
