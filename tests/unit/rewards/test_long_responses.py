"""Responses on which a careless pattern takes quadratic time or more: in a megabyte hours, seen as a hang."""

import pytest

from tasks.config.rules import CodeRule
from tasks.rewards.code import extract_program
from tasks.rewards.rules.answers import exact_match, strict_match
from tests.unit.rewards.conftest import score

LENGTH = 100_000

UNITS = (
    "1", "1,", "1.", ".1", "1e", "-", ".", ".)", ")", "\n", " ", "\n ", "- ", "-\n", "* ", "a", "a'", "a ", "a. ",
    "but good bad ", "not good ", "😀", "[", '{"a":', "```\n", "```text\n", "`", "def ", "def f\n", "async ",
)  # fmt: skip
"""What is repeated, after the words of a sentence and before a letter that is nowhere else."""

RULES: dict[str, dict[str, object]] = {
    "format": {"pattern": r".*[.!?]"},
    "instructions": {"min_words": 2, "min_bullets": 1, "min_sentences": 1, "min_paragraphs": 1, "contains": ("good",)},
    "json_schema": {"json_schema": {"type": "array", "items": {"$ref": "#"}}},
    "length": {},
    "readability": {},
    "repetition": {},
    "vader": {},
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_done_with_any_long_response(rule: str) -> None:
    for unit in UNITS:
        score(rule, "This is a sentence of words. " + unit * (LENGTH // len(unit)) + "z", **RULES[rule])
        score(rule, unit * (LENGTH // len(unit)), **RULES[rule])


def test_answers_are_found_in_any_long_response() -> None:
    for unit in UNITS:
        response = unit * (LENGTH // len(unit))
        assert exact_match(response, "42") == strict_match(response, "42", r"#### (\-?[0-9\.\,]+)") == 0


@pytest.mark.parametrize("before", ["", "```", "```python\n", "```python\nasync "])
@pytest.mark.parametrize("after", ["", "`", "\n```"])
def test_programs_are_found_in_any_long_response(before: str, after: str) -> None:
    for unit in UNITS:
        extract_program(CodeRule(), "def f():\n", before + unit * (LENGTH // len(unit)) + after, "f")


def test_json_too_deep_for_its_schema_is_none_that_fits() -> None:
    options = {"json_schema": {"type": "array", "items": {"$ref": "#"}}}
    assert [score("json_schema", "[" * depth + "]" * depth, **options) for depth in (3, 300, 90_000)] == [1, 0, 0]
