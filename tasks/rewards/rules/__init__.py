"""Rewards that are plain functions of the text: nothing learned, so nothing to over-fit, but each can be gamed.

Each rule says how a policy could earn it without earning what it stands for, and what stands against that. All of
them see the response without its end token.
"""

from __future__ import annotations

from collections.abc import Mapping

from tasks.rewards.code import code_reward
from tasks.rewards.rules.answers import answer_rule, facts_rule
from tasks.rewards.rules.form import form, json_schema_rule
from tasks.rewards.rules.instructions import instructions_rule
from tasks.rewards.rules.kinds import RuleFactory, of_response
from tasks.rewards.rules.mathematics import mathematics_rule
from tasks.rewards.rules.poem import poem_rule
from tasks.rewards.rules.style import language_rule, length, readability, repetition, sentiment_rule
from tasks.rewards.rules.users import custom_rule

__all__ = ["RULES", "factory_of"]

RULES: Mapping[str, RuleFactory] = {
    "answer": answer_rule,
    "code": code_reward,
    "facts": facts_rule,
    "format": of_response(form, "pattern", "match"),
    "instructions": instructions_rule,
    "json_schema": json_schema_rule,
    "language": language_rule,
    "length": of_response(length, "target", "tolerance"),
    "mathematics": mathematics_rule,
    "poem": poem_rule,
    "readability": of_response(readability, "low", "high", "tolerance", "min_words"),
    "repetition": of_response(repetition),
    "sentiment": sentiment_rule,
}
"""Rule → how to make it. A new one is a line here and one, with its options, in `tasks.core.sections.rules.OPTIONS`.

A factory gives an `EachSample`, whose failures are counted, or a function of the whole batch (see `kinds`).
"""


def factory_of(function: str) -> RuleFactory:
    """The factory of a rule, or of a user's function."""
    return RULES.get(function, custom_rule)
