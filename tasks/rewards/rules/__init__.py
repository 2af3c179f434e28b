"""Rule-based rewards: plain functions of the text, without its end token.

The docstring of each rule says how a policy could game it, and what prevents that.
"""

from collections.abc import Mapping

from tasks.rewards.code import CodeReward
from tasks.rewards.rules.answers import answer_rule, contains_facts_rule
from tasks.rewards.rules.base import RuleFactory, custom_rule, response_rule
from tasks.rewards.rules.format import instructions_rule, json_schema_rule, matches_pattern
from tasks.rewards.rules.math import math_rule
from tasks.rewards.rules.poem import poem_rule
from tasks.rewards.rules.style import language_rule, length, readability, repetition, vader_rule

__all__ = ["RULES", "custom_rule"]

RULES: Mapping[str, RuleFactory] = {
    "answer": answer_rule,
    "code": CodeReward,
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
"""Rule → factory. A new one is a line here and one, with its options, in `tasks.config.rules.RULE_OPTIONS`."""
