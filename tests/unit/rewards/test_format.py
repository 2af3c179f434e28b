"""Forms, JSON schemas, instructions and facts."""

import pytest
from pydantic import ValidationError

from tasks.config.rules import RULE_OPTIONS, InstructionsRule
from tasks.core.errors import DataError
from tasks.rewards.rules import RULES
from tasks.rewards.rules.base import FaultTolerantRule
from tasks.rewards.rules.format import check_constraints, json_schema_rule, matches_pattern
from tests.unit.rewards.conftest import score

TAGS = r"(?s)<think>.{3,}</think>\s*<answer>\d+</answer>"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 1}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("response", "whole", "contains"),
    [
        (" <think>2 + 2</think>\n<answer>4</answer>\n", 1.0, 1.0),
        ("Well: <think>2 + 2</think><answer>4</answer>", 0.0, 1.0),
        ("<think></think><answer>4</answer>", 0.0, 0.0),
        ("<think>2 + 2</think><answer></answer>", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_a_form_is_matched_whole_or_somewhere(response: str, whole: float, contains: float) -> None:
    assert matches_pattern(response, pattern=TAGS, match="whole") == whole
    assert matches_pattern(response, pattern=TAGS, match="contains") == contains


def test_a_pattern_that_would_take_for_ever_is_a_failure_of_the_rule() -> None:
    rule = FaultTolerantRule(
        "format", lambda _, response: matches_pattern(response, pattern="(a|aa)+", match="whole"), floor=-1.0
    )
    values, metrics = rule.score_with_metrics(["", ""], ["a" * 80 + "b", "aaa"])
    assert values.tolist() == [-1.0, 1.0]
    assert metrics["failures/format"].tolist() == [1.0, 0.0]


def test_so_is_one_in_a_schema() -> None:
    options = RULE_OPTIONS["json_schema"](function="json_schema", json_schema={"items": {"pattern": "^(a|aa)+$"}})
    rule = json_schema_rule(options, {})
    assert [rule.score("", text) for text in ('["aaa", 1]', '["aab"]')] == [1.0, 0.0]
    with pytest.raises(TimeoutError):
        rule.score("", '["' + "a" * 80 + 'b"]')


@pytest.mark.parametrize(
    ("response", "value"),
    [
        (' {"name": "Ada", "age": 36}\n', 1.0), ('{"age": 36}', 0.0), ('{"name": "", "age": 36}', 0.0), ("{}", 0.0),
        ('{"name": "Ada", "age": 36, "x": 1}', 0.0), ('{"name": "Ada", "age": NaN}', 0.0), ('{"name": "Ada"', 0.0),
        ('Sure: {"name": "Ada", "age": 36}', 0.0), ("", 0.0), ("[" * 100_000, 0.0),
    ],
)  # fmt: skip
def test_json_must_fit_its_schema(response: str, value: float) -> None:
    assert score("json_schema", response, json_schema=PERSON) == value


@pytest.mark.parametrize(
    ("format_", "good", "bad"),
    [
        ("email", "a@b", "no"), ("date", "2026-01-31", "2026-02-31"), ("ipv4", "10.0.0.1", "10.0.0"),
        ("regex", "a+", "("), ("uuid", "00000000-0000-4000-8000-000000000000", "0"),
    ],
)  # fmt: skip
def test_a_format_is_asked_for(format_: str, good: str, bad: str) -> None:
    schema = {"type": "string", "format": format_}
    assert score("json_schema", f'"{good}"', json_schema=schema) == 1.0
    assert score("json_schema", f'"{bad}"', json_schema=schema) == 0.0


NOWHERE = {"$ref": "#/$defs/nowhere"}


@pytest.mark.parametrize("schema", [NOWHERE, {"properties": {"a": {"items": NOWHERE}}}, {"$ref": "http://a.b/c.json"}])
def test_a_reference_that_leads_nowhere_is_refused(schema: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=r"(?s)json_schema.*\$ref .*(nowhere|c\.json).* is not in the schema"):
        RULE_OPTIONS["json_schema"](function="json_schema", json_schema=schema)


SCHEMAS = "https://json-schema.org/draft/2020-12/schema"


def test_references_within_the_schema_and_to_the_one_of_schemas_are_followed() -> None:
    inner = {"$id": "http://m", "$defs": {"k": {}}, "items": {"$ref": "#/$defs/k"}}
    schema = {
        "$defs": {"n": {"type": "integer"}, "m": inner},
        "properties": {"a": {"$ref": "#/$defs/n"}, "b": {"$ref": SCHEMAS}, "$ref": {"enum": [NOWHERE]}},
    }
    assert score("json_schema", '{"a": 1}', json_schema=schema) == 1.0
    assert score("json_schema", '{"a": "1"}', json_schema=schema) == 0.0


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"min_words": 3, "max_words": 2}, "min_words 3 is above max_words 2"),
        ({"min_bullets": 2, "max_bullets": 1}, "min_bullets 2 is above max_bullets 1"),
        ({"contains": ("sun", "")}, "contains has an empty phrase"),
        ({"avoids": (" ",)}, "avoids has an empty phrase"),
    ],
)
def test_constraints_that_nothing_keeps_are_refused(options: dict[str, object], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        RULE_OPTIONS["instructions"](function="instructions", **options)


@pytest.mark.parametrize(
    ("response", "held"),
    [
        ("One two. Three four.\n\n* five\n- six", [True, True, True, True, True, True]),
        ("One two three four five six seven", [True, False, False, False, False, True]),
        ("* one\n* two\n* three", [True, True, False, False, True, False]),
    ],
)
def test_bounds_are_counted(response: str, held: list[bool]) -> None:
    bounds = {
        "min_words": 3,
        "max_words": 6,
        "min_sentences": 2,
        "min_paragraphs": 2,
        "min_bullets": 2,
        "max_bullets": 2,
    }
    assert list(check_constraints(response, InstructionsRule(function="instructions", **bounds))) == held


@pytest.mark.parametrize(
    ("options", "good", "bad"),
    [
        ({"contains": ("red fox",)}, "A Red fox ran.", "A red foxglove."),
        ({"avoids": ("cat",)}, "Concatenate it.", "A Cat!"),
        ({"ends_with": "Any questions?"}, "Done. any questions? ", "Any questions? No."),
        ({"case": "lower"}, "all low, 3 times", "Not all"),
        ({"case": "upper"}, "ALL UP, 3 TIMES", "Not ALL"),
        ({"commas": False}, "No sign; none", "One, two"),
        ({"max_sentences": 1}, "One only.", "One. Two."),
        ({"max_paragraphs": 1}, "One\nonly", "One\n\nTwo"),
    ],
)
def test_each_constraint_holds_or_not(options: dict[str, object], good: str, bad: str) -> None:
    assert score("instructions", good, **options) == 1.0
    assert score("instructions", bad, **options) == 0.0


def test_the_share_of_constraints_that_hold_is_paid_and_silence_is_not() -> None:
    options = {"contains": ("sun", "moon"), "avoids": ("star",), "max_words": 4}
    assert score("instructions", "the sun and a star shine", **options) == 0.25
    assert score("instructions", "sun moon", **options) == 1.0
    for empty in ("", " ", "...!"):
        assert score("instructions", empty, avoids=("star",), commas=False, max_words=4) == 0.0


@pytest.mark.parametrize(
    ("response", "answer", "value"),
    [
        (" Marie Curie, in 1903.", "Marie Curie|1903", 1.0), (" the Beatles!", '["The Beatles", "The Stones"]', 0.5),
        (" Curie Marie", "Marie Curie", 0.0), (" concord", "Concorde", 0.0), ("", "Ada", 0.0),
        (" Ada" + " Bob" * 7, "Ada", 0.5), (" Paris London Berlin Rome Madrid Vienna Lisbon Oslo", "Paris", 0.5),
    ],
)  # fmt: skip
def test_facts_are_named_as_squad_normalises_and_candidates_cost(response: str, answer: str, value: float) -> None:
    assert score("contains_facts", response, answer, max_words=4) == value


@pytest.mark.parametrize("answer", ["", "a|", '["Ada", ""]', "[]", '["Ada"'])
def test_facts_that_are_none_are_an_error(answer: str) -> None:
    options = RULE_OPTIONS["contains_facts"](function="contains_facts")
    with pytest.raises(DataError, match="the facts"):
        RULES["contains_facts"](options, {"Who?": "Ada", "And?": answer})
