"""Answers and style by hand; rules that users write; failures of rules, which are counted."""

import gzip
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.config.reward import RewardParams
from tasks.config.rules import RULE_OPTIONS, check_custom_rule
from tasks.core.custom import forget_custom
from tasks.core.errors import ConfigError, TrainingError
from tasks.core.rows import Prompt
from tasks.rewards.composition import CompositeReward, build_reward
from tasks.rewards.rules import RULES
from tasks.rewards.rules.answers import exact_match, strict_match
from tasks.rewards.rules.base import FaultTolerantRule
from tasks.rewards.rules.style import (
    VADER_CHARACTERS,
    count_sentences,
    count_syllables,
    length,
    readability,
    reading_ease,
    repetition,
)  # fmt: skip
from tests.unit.rewards.conftest import score

GSM8K = r"#### (\-?[0-9\.\,]+)"
"""The strict-match of lm-eval's task gsm8k."""


def _text(words: int) -> str:
    return " " + " ".join(f"w{number}" for number in range(words))


@pytest.mark.parametrize(
    ("words", "value"), [(12, 1.0), (9, 0.75), (15, 0.75), (6, 0.5), (0, 0.0), (24, 0.0), (25, 0.0), (100, 0.0)]
)
def test_length_is_a_triangle_over_words_and_not_punctuation(words: int, value: float) -> None:
    assert length(_text(words), target=12, tolerance=12) == pytest.approx(value)
    assert length(" ... !!! ," + _text(words), target=12, tolerance=12) == pytest.approx(value)


def test_repetition_is_minus_the_share_of_repeated_pairs() -> None:
    assert repetition(" good good good good good") == pytest.approx(-3 / 4)


@pytest.mark.parametrize("response", ["", " ", " !", " good", " good good", " a moving and quiet film"])
def test_what_repeats_nothing_gets_a_zero_without_sign(response: str) -> None:
    assert str(repetition(response)) == "0.0"


def test_every_rule_has_options_and_every_option_a_rule() -> None:
    assert set(RULES) == set(RULE_OPTIONS)


@pytest.mark.parametrize(
    ("rule", "options", "values"),
    [
        ("answer", {}, [0.0, 1.0]),
        ("length", {"target": 4, "tolerance": 2}, [0.5, 0.5]),
        ("repetition", {}, [0.0, -0.5]),
    ],
)
def test_rules_read_their_options_and_answers(rule: str, options: dict[str, object], values: list[float]) -> None:
    assert [score(rule, response, "so so so", **options) for response in (_text(3), " so so so")] == values


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
    assert strict_match("none", "42", r"none|it is (\d+)") == 0.0, "a group that takes no part in the match"


def test_a_pattern_that_would_search_for_ever_does_not_match() -> None:
    assert strict_match("a" * 60 + "!", "a", r"^((?:a|aa)+)$") == 0.0


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


# -- style -----------------------------------------------------------------------------------------------------

BAND = {"low": 50.0, "high": 90.0, "tolerance": 40.0, "min_words": 5}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0), ("...", 0), ("One", 1), ("One.", 1), ("One. Two", 2), ("One! Two?! Three…", 3), ("Wait... what?", 2),
        ("It costs 3.5 pounds.", 1), ('He said "no." Then he left.', 2),
    ],
)  # fmt: skip
def test_sentences_end_with_marks_before_space(text: str, count: int) -> None:
    assert count_sentences(text) == count


@pytest.mark.parametrize(
    ("word", "count"),
    [
        ("cat", 1), ("like", 1), ("little", 2), ("banana", 3), ("the", 1), ("tree", 1), ("rhythm", 1), ("readable", 3),
        ("jumped", 1), ("wanted", 2), ("faded", 2), ("called", 1), ("handled", 2), ("freed", 1), ("annoyed", 2),
        ("makes", 1), ("pages", 2), ("houses", 2), ("wishes", 2), ("angles", 2), ("whales", 1), ("whole", 1),
        ("queue", 1), ("continue", 3),
    ],
)  # fmt: skip
def test_syllables_are_groups_of_vowels(word: str, count: int) -> None:
    assert count_syllables(word) == count


def test_reading_ease_is_fleschs_formula() -> None:
    """Six words, one sentence, six syllables; then eight words with 3+2+1+3 and 1+1+2+3 syllables in two sentences."""
    assert reading_ease("The cat sat on the mat.") == pytest.approx(206.835 - 1.015 * 6 - 84.6)
    text = "Banana salad looks wonderful. I like little tomatoes."
    assert reading_ease(text) == pytest.approx(206.835 - 1.015 * 4 - 84.6 * 16 / 8)


@pytest.mark.parametrize(
    ("low", "high", "value"), [(116.0, 117.0, 1.0), (100.0, 106.145, 0.75), (126.145, 150.0, 0.75), (0.0, 70.0, 0.0)]
)
def test_readability_is_paid_within_its_band(low: float, high: float, value: float) -> None:
    found = readability("The cat sat on the mat.", low=low, high=high, tolerance=40.0, min_words=5)
    assert found == pytest.approx(value)


@pytest.mark.parametrize("gamed", ["", "I.", "I am. I go.", "a a a a a a a. I. I. I. I.", "... !!! ???"])
def test_readability_is_not_paid_for_crumbs(gamed: str) -> None:
    assert readability(gamed, **BAND) < 0.4


def test_sentiment_is_vaders_compound_in_the_wanted_direction() -> None:
    assert score("vader", " good") == pytest.approx(1.9 / (1.9**2 + 15) ** 0.5, abs=1e-4)  # its normalisation
    assert score("vader", " good", sign="negative") == pytest.approx(-1.9 / (1.9**2 + 15) ** 0.5, abs=1e-4)
    assert score("vader", "") == 0.0


def test_the_sum_of_valences_has_no_bound_and_no_rules() -> None:
    assert score("vader", " Good, not GOOD and very good", form="sum") == pytest.approx(3 * 1.9)
    assert score("vader", " good bad", form="sum", sign="negative") == pytest.approx(2.5 - 1.9)
    assert score("vader", " the table", form="sum") == 0.0


def test_vader_reads_the_beginning_of_a_long_text() -> None:
    filler = "x " * (VADER_CHARACTERS // 2)
    assert score("vader", "Good. " + filler) == score("vader", "Good. ") > 0
    assert score("vader", filler + "Good.") == 0


def test_a_language_is_distinguished_from_others() -> None:
    pytest.importorskip("py3langid")
    english, german = " The weather was fine and we walked home.", " Das Wetter war schön und wir gingen nach Hause."
    assert score("language", english) > 0.9
    assert score("language", german) < 0.1
    assert score("language", german, language="de") > 0.9
    assert score("language", " The the") == 0.0, "two words are too few"
    assert score("language", "") == 0.0
    with pytest.raises(ConfigError, match=r"knows no language 'xx'; it knows .*, af, "):
        score("language", "", language="xx")


def test_a_package_that_is_missing_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(ConfigError, match=r"rule 'language' needs .*'py3langid\.langid'.*pip install -e '\.\[rules\]'"):
        score("language", "")


# -- failures ---------------------------------------------------------------------------------------------------


def inverse(prompt: str, response: str) -> float:
    return 1 / int(response)


def test_a_failure_earns_the_floor_is_counted_and_is_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    reward = CompositeReward({"inverse": FaultTolerantRule("inverse", inverse, floor=-1.0)}, {"inverse": 2.0})
    outcome = reward(["p", "q", "r"], ["4", "0", "many"])
    assert outcome.total.tolist() == [0.5, -2.0, -2.0]
    assert {name: failed.tolist() for name, failed in outcome.metrics.items()} == {"failures/inverse": [0.0, 1.0, 1.0]}
    message = capsys.readouterr().err
    assert "component 'inverse' failed on prompt 'q', response '0': ZeroDivisionError: division by zero" in message
    reward(["q"], ["0"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_a_failure(bad: float) -> None:
    rule = FaultTolerantRule("odd", lambda prompt, response: bad, floor=0.5)
    values, metrics = rule.score_with_metrics(["p"], ["r"])
    assert (values.tolist(), metrics["failures/odd"].tolist()) == ([0.5], [1.0])


@pytest.mark.parametrize(("failing", "of", "stops"), [(4, 8, False), (5, 8, True), (8, 8, True), (7, 7, False)])
def test_most_of_a_batch_of_eight_is_no_accident(failing: int, of: int, stops: bool) -> None:
    responses = ["0"] * failing + ["1"] * (of - failing)
    rule = FaultTolerantRule("inverse", inverse, floor=0.0)
    if stops:
        with pytest.raises(TrainingError, match=rf"'inverse' fails on {failing} of {of} responses.*ZeroDivisionError"):
            rule.score_with_metrics(["p"] * of, responses)
    else:
        assert rule.score_with_metrics(["p"] * of, responses)[1]["failures/inverse"].sum() == failing


def test_each_rule_has_its_own_floor() -> None:
    rules = RewardParams(weights={"repetition": 1.0, "length": 1.0, "vader": 1.0}).rules
    assert {name: rule.floor for name, rule in rules.items()} == {"repetition": -1.0, "length": 0.0, "vader": -1.0}


# -- rules of users ---------------------------------------------------------------------------------------------

MODULE = """
import math
LIMIT = 3
class Kept: ...
def near(prompt: str, response: str, answer: str | None, scale: float, *, sign: int = 1) -> float:
    return sign * scale * (len(response) if answer is None else abs(len(response) - len(answer)))
def free(prompt, response, answer, **options):
    return float(options["base"])
def short(prompt, response):
    return 0.0
"""


@pytest.fixture
def folder(root: Path) -> Iterator[Path]:
    """A folder of users' modules, known to params and importable, and nothing of it left behind."""
    rewards = root / "custom" / "rewards"
    rewards.mkdir(parents=True)
    (rewards / "mine.py").write_text(MODULE)
    (rewards / "broken.py").write_text("import no_such_package\ndef f(prompt, response, answer): ...")
    (rewards / "crooked.py").write_text("def f(:")
    forget_custom()
    yield rewards
    forget_custom()


def test_the_example_scores_by_its_options() -> None:
    params = RewardParams(weights={"loud": 2.0}, rules={"loud": {"function": "example:shout", "at_most": 0.5}})
    assert build_reward(params, [], None)(["p"] * 3, ["AAaa", "AAAA", "12!"]).total.tolist() == [1.0, 1.0, 0.0]


def test_a_function_gets_the_sample_its_answer_and_its_options(folder: Path) -> None:
    own = {"near": {"function": "mine:near", "scale": 2.0, "sign": -1}, "free": {"function": "mine:free", "base": 7}}
    params = RewardParams(weights={"near": 1.0, "free": 1.0}, rules=own)
    rows = [Prompt(id="a", prompt="Who?", answer="Ada"), Prompt(id="b", prompt="Hm")]
    outcome = build_reward(params, rows, None)(["Who?", "Hm"], ["A", "four"])
    assert outcome.components["near"].tolist() == [-4.0, -8.0]  # −2·|1 − 3|, −2·4
    assert outcome.components["free"].tolist() == [7.0, 7.0]


@pytest.mark.parametrize(
    ("function", "options", "problem"),
    [
        ("mien:near", {}, r"there is no custom/rewards/mien\.py; did you mean mine"),
        ("mine:nera", {"scale": 1}, r"mine\.py defines no 'nera'; did you mean near"),
        ("mine:LIMIT", {}, r"mine\.py defines no 'LIMIT'; there is: Kept, free, near, short"),
        ("mine:near", {}, r"'mine:near' needs the option 'scale'; add it beside `function`"),
        ("mine:near", {"scale": 1, "sing": 1}, r"takes no option 'sing'; did you mean sign"),
        ("mine:Kept", {}, r"'mine:Kept' is a class; name a function"),
        ("mine:short", {}, r"must take \(prompt, response, answer, …\), it takes \('prompt', 'response'\)"),
        ("crooked:f", {}, r"crooked\.py:1 is no Python"),
    ],
)
def test_what_is_not_there_is_reported_before_anything_runs(
    function: str, options: dict[str, object], problem: str, folder: Path
) -> None:
    with pytest.raises(ValueError, match=problem):
        check_custom_rule(function, options)


def test_a_module_that_cannot_be_imported_is_named(folder: Path) -> None:
    params = RewardParams(weights={"b": 1.0}, rules={"b": {"function": "broken:f"}})
    with pytest.raises(ConfigError, match=r"'broken:f' cannot be imported: ModuleNotFoundError.*no_such_package"):
        build_reward(params, [], None)
