"""Language, mood and readability, by hand and against the gaming that their docstrings name."""

from __future__ import annotations

import sys

import pytest

from tasks.core.errors import ConfigError
from tasks.rewards.rules.style import count_sentences, count_syllables, readability, reading_ease
from tests.unit.rewards.conftest import score

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
