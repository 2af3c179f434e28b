"""Rewards that are functions of the text, each with a docstring that says how it can be gamed.

All of them see the response without its end token. A new rule is an entry in `RULES` and, with its options, one in
`tasks.config.rules.RULE_OPTIONS`.
"""

from __future__ import annotations

from collections.abc import Mapping

from tasks.rewards.code import code_reward
from tasks.rewards.rules.answers import answer_rule, contains_facts_rule
from tasks.rewards.rules.base import RuleFactory, response_rule
from tasks.rewards.rules.custom import custom_rule
from tasks.rewards.rules.format import json_schema_rule, matches_pattern
from tasks.rewards.rules.instructions import instructions_rule
from tasks.rewards.rules.math import math_rule
from tasks.rewards.rules.poem import poem_rule
from tasks.rewards.rules.style import language_rule, length, readability, repetition, vader_rule

__all__ = ["RULES", "get_rule_factory"]

RULES: Mapping[str, RuleFactory] = {
    "answer": answer_rule,
    "code": code_reward,
    "contains_facts": contains_facts_rule,
    "format": response_rule(matches_pattern, "pattern", "match"),
    "instructions": instructions_rule,
    "json_schema": json_schema_rule,
    "language": language_rule,
    "length": response_rule(length, "target", "tolerance"),
    "math": math_rule,
    "poem": poem_rule,
    "readability": response_rule(readability, "low", "high", "tolerance", "min_words"),
    "repetition": response_rule(repetition),
    "vader": vader_rule,
}
"""Rule → factory. A new one is a line here and one, with its options, in `tasks.config.rules.OPTIONS`.

A factory gives a `PerSampleRule`, whose failures are counted, or a function of the whole batch (see `kinds`).
"""


def get_rule_factory(function: str) -> RuleFactory:
    """Get the factory of a rule, or of a user's function."""
    return RULES.get(function, custom_rule)
