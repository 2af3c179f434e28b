import gzip
import json
from pathlib import Path

import pytest

from tasks.config.rules import RULE_OPTIONS
from tasks.rewards.rules import RULES
from tasks.rewards.rules.answers import exact_match, strict_match
from tasks.rewards.rules.style import length, repetition

GSM8K = r"#### (\-?[0-9\.\,]+)"
"""The strict-match of lm-eval's task gsm8k."""


def _text(words: int) -> str:
    return " " + " ".join(f"w{number}" for number in range(words))


@pytest.mark.parametrize(
    ("words", "value"), [(12, 1.0), (9, 0.75), (15, 0.75), (6, 0.5), (0, 0.0), (24, 0.0), (25, 0.0), (100, 0.0)]
)
def test_length_is_a_triangle_over_words(words: int, value: float) -> None:
    assert length(_text(words), target=12, tolerance=12) == pytest.approx(value)


def test_length_is_not_paid_for_punctuation() -> None:
    assert length(" w0 ... !!! , w1", target=2, tolerance=1) == 1.0


def test_repetition_is_minus_the_share_of_repeated_pairs() -> None:
    assert repetition(" good good good good good") == pytest.approx(-3 / 4)
    assert repetition(" a moving and quiet film") == 0.0


@pytest.mark.parametrize("response", ["", " ", " !", " good", " good good"])
def test_very_short_responses_have_nothing_to_repeat(response: str) -> None:
    assert str(repetition(response)) == "0.0"


def test_every_rule_has_options_and_every_option_a_rule() -> None:
    assert set(RULES) == set(RULE_OPTIONS)


def test_rules_read_their_parameters_and_what_is_known_about_the_prompts() -> None:
    prompt, answers = "good good good", {"good good good": "so so so"}
    options = {"answer": {}, "length": {"target": 4, "tolerance": 2}, "repetition": {}}
    scores = {}
    for name, chosen in options.items():
        rule = RULES[name](RULE_OPTIONS[name](function=name, **chosen), answers)
        scores[name] = [rule.score(prompt, response) for response in (_text(3), " so so so")]
    assert scores == {"answer": [0.0, 1.0], "length": [0.5, 0.5], "repetition": [0.0, -0.5]}


@pytest.mark.parametrize(
    ("response", "expected", "value"),
    [
        (" 42", "42", 1.0), (" 42.", "42", 1.0), (" 4 + 38 = 42", "42", 1.0), (" 42 or 43", "42", 0.0),
        (" 42 43 44", "44", 1.0), (" -7", "-7", 1.0), (" −7", "-7", 1.0), (" 7", "-7", 0.0), (" 1,234", "1234", 1.0),
        (" 3.50", "3.5", 1.0), (" 3.5", "3", 0.0), ("", "42", 0.0), (" none", "42", 0.0), (" 142", "42", 0.0),
        (" +7", "7", 1.0), (" 7", "+7", 1.0), (" 42.0", "42", 1.0), ("$1,234.00.", "1234", 1.0), (" 7", "-7.0", 0.0),
        (" Yes ", "yes", 1.0), (" no", "yes", 0.0), (" yes and no", "yes", 0.0),
        (" .5", "0.5", 1.0), (" .5", "5", 0.0), (" -.5", "-0.5", 1.0), ("$.50", "0.5", 1.0), (" 0.5", ".5", 1.0),
        (" 3-5", "5", 1.0), (" 3-5", "-5", 0.0), (" 3 - -5", "-5", 1.0), (" x=-5", "-5", 1.0), (" (3)-5", "-5", 0.0),
        (" COVID-19", "19", 1.0), (" so...5", "5", 1.0), (" 8−5", "5", 1.0), (" 5.", "5", 1.0), (" no.5", "5", 1.0),
        ("It is -$5", "-5", 1.0), ("It is -$5", "5", 0.0), ("It is −€5.50", "-5.5", 1.0), ("cost-$5", "5", 1.0),
        ("about 1e5", "100000", 1.0), ("1e5", "5", 0.0), ("1.5E-3", "0.0015", 1.0), ("5 euros", "5", 1.0),
        ("2e", "2", 1.0), ("-5", "-$5", 1.0),
    ],
)  # fmt: skip
def test_an_answer_is_right_by_its_last_number_or_its_word(response: str, expected: str, value: float) -> None:
    assert exact_match(response, expected) == value


@pytest.mark.parametrize(
    ("response", "expected", "value"),
    [
        (" 42\n", "42", 1.0), (" 42.", "42", 1.0), ("42.0", "42", 1.0), (" 1,234", "1234", 1.0), ("+42", "42", 1.0),
        ("−42", "-42", 1.0), ("42", "-42", 0.0), ("It is 42", "42", 0.0), ("42 or 42", "42", 0.0), ("", "42", 0.0),
        ("42..", "42", 0.0), (" Yes ", "yes", 1.0), ("Yes.", "yes", 0.0), ("yes and no", "yes", 0.0),
    ],
)  # fmt: skip
def test_without_a_pattern_the_whole_response_must_be_the_answer(response: str, expected: str, value: float) -> None:
    assert strict_match(response, expected, None) == value


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("So 40 + 2 = 42.\n#### 42", 1.0), ("#### 42.", 1.0), ("#### 42.0 apples", 1.0), ("#### 0042", 1.0),
        ("#### 4,2", 1.0), ("#### 41\n#### 42", 0.0), ("#### 42\n#### 41", 1.0), ("####42", 0.0), ("It is 42", 0.0),
        ("#### $42", 0.0), ("#### ,", 0.0), ("#### -42", 0.0), ("", 0.0),
    ],
)  # fmt: skip
def test_with_a_pattern_its_first_match_must_be_the_answer(response: str, value: float) -> None:
    assert strict_match(response, "42", GSM8K) == value


def test_a_group_that_takes_no_part_in_the_match_is_no_answer() -> None:
    assert strict_match("none", "42", r"none|it is (\d+)") == 0.0


def test_real_solutions_are_right_in_form_and_without_their_mark_in_value_alone() -> None:
    """GSM8K's 1,319 worked solutions, each against the number after its own mark; without the mark the number stays."""
    file = Path(__file__).parents[4] / "shared" / "data" / "gsm8k" / "test.jsonl.gz"
    if not file.is_file():
        pytest.skip("no GSM8K on this machine")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        solutions = [json.loads(line)["answer"] for line in lines]
    assert len(solutions) == 1319
    readings = {"strict": lambda *pair: strict_match(*pair, GSM8K), "flexible": exact_match}
    for change, expected in ((str, {"strict": 1319, "flexible": 1319}), (_unmarked, {"strict": 0, "flexible": 1319})):
        pairs = [(change(solution), solution.rpartition("#### ")[2]) for solution in solutions]
        assert {name: sum(right(*pair) for pair in pairs) for name, right in readings.items()} == expected


def _unmarked(solution: str) -> str:
    return solution.replace("#### ", "")
