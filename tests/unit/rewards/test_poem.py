"""Five lines: what a limerick earns, and what its imitations do not."""

import json
from pathlib import Path

import pytest

from tasks.config.rules import PoemRule
from tasks.rewards.rules.poem import lines_of, poem_rule, poem_scores, rhyme_score, words_rhyme

pytest.importorskip("pronouncing")

PRESETS = Path(__file__).resolve().parents[3] / "infra" / "presets"
OPTIONS = PoemRule(function="poem", topic="about (.+):")
PROMPT = "Write a limerick about a lazy old cat:\n"
GOOD = [
    "There once was a lazy old cat,",
    "Who slept in the crown of a hat.",
    "When mice came to play",
    "He looked the other way,",
    "And grew rather sleepy and fat.",
]


def score(response: str, prompt: str = PROMPT) -> float:
    return poem_rule(OPTIONS, {}).score(prompt, response)


def test_a_limerick_earns_everything() -> None:
    assert poem_scores(PROMPT, "\n".join(GOOD), OPTIONS) == dict.fromkeys(
        ("lines", "rhyme", "metre", "distinct", "sane", "dictionary", "topic"), 1.0
    )
    assert score("\n" + "\n\n".join(GOOD) + "\n") == 1.0


def test_every_demonstration_of_the_preset_is_one() -> None:
    rows = [json.loads(line) for line in (PRESETS / "poem.jsonl").read_text(encoding="utf-8").splitlines()]
    topics = [json.loads(line) for line in (PRESETS / "poem_topics.jsonl").read_text(encoding="utf-8").splitlines()]
    values = {row["prompt"]: score(row["response"], row["prompt"]) for row in rows}
    assert len(values) == 40
    assert min(values.values()) > 0.9
    assert len(set(values) | {row["prompt"] for row in topics}) == 200
    assert score(rows[0]["response"], rows[1]["prompt"]) == 0.0, "another topic's poem"


SHOUTED = [GOOD[0], *(GOOD[0].upper() + "!" * count for count in range(4))]
MADE_UP = [
    "Blorpt greltz snibz",
    "Qwopz drelmz snarpz",
    "Zibz zorbz prelpt",
    "Vibz vorbz brelpt",
    "Vlimz flarbz vneltz",
]


@pytest.mark.parametrize(
    ("guard", "lines"),
    [
        ("lines", []),
        ("distinct", GOOD[:1] * 5),
        ("distinct", SHOUTED),
        ("sane", ["cat", "hat", "play", "day", "fat"]),
        ("sane", [" ".join(GOOD)]),
        ("dictionary", MADE_UP),
        ("topic", [line.replace("lazy old cat", "hungry brown rat") for line in GOOD]),
    ],
)
def test_imitations_earn_nothing(guard: str, lines: list[str]) -> None:
    assert poem_scores(PROMPT, "\n".join(lines), OPTIONS)[guard] == 0.0
    assert score("\n".join(lines)) == 0.0


def test_half_a_form_earns_half() -> None:
    """Two lines of five: lines 2/5, one pair of four, two of five lines scan; all else is in order."""
    assert score("\n".join(GOOD[:2])) == pytest.approx((2 / 5 + 1 / 4 + 2 / 5) / 3)


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        ([" ".join(GOOD)], {"lines": pytest.approx(0.2), "rhyme": 0.0, "metre": 0.0, "sane": 0.0}),
        ([*GOOD[:4], GOOD[1]], {"distinct": 0.75}),
        ([*GOOD[:4], "And so " * 10 + "fat"], {"sane": 0.8, "metre": 0.8}),
    ],
)
def test_one_line_for_all_a_repeated_and_an_endless_line_cost(lines: list[str], parts: dict[str, float]) -> None:
    found = poem_scores(PROMPT, "\n".join(lines), OPTIONS)
    assert {name: found[name] for name in parts} == parts


@pytest.mark.parametrize(
    ("one", "other", "value"),
    [
        ("cat", "hat", True), ("bright", "right", True), ("hours", "flowers", True), ("sea", "see", False),
        ("cat", "cat", False), ("leave", "believe", False), ("money", "honey", True), ("brelp", "zelp", False),
        ("cat", "dog", False), ("hmm", "shh", False), ("hmm", "him", False),
    ],
)  # fmt: skip
def test_words_rhyme_by_sound_and_not_with_themselves(one: str, other: str, value: bool) -> None:
    assert words_rhyme(one, other) is value


@pytest.mark.parametrize(
    ("scheme", "ends", "value"),
    [
        ("AABBA", "cat hat play day fat", 1.0), ("AABBA", "cat hat play dog fat", 0.75),
        ("AABBA", "cat hat mat bat fat", 0.75), ("AABBA", "cat cat cat cat cat", 0.0), ("AABBA", "cat hat play", 0.25),
        ("AABBA", "", 0.0), ("AABBA", "cat dog play bread fat", 0.25), ("AABBA", "cat hat cat hat mat", 0.75),
        ("AABBA", "cat hat hmm day fat", 0.75), ("AABBCC", "go so cat hat bat mat", 2 / 3),
        ("AABBCC", "cat hat play day way say", 2 / 3), ("AABBCC", "go so cat hat play day", 1.0),
    ],
)  # fmt: skip
def test_pairs_of_the_scheme_rhyme_and_a_letter_sounds_unlike_earlier_ones(
    scheme: str, ends: str, value: float
) -> None:
    assert rhyme_score(ends.split(), scheme) == value


def test_another_form_can_be_asked_for() -> None:
    couplet = PoemRule(function="poem", scheme="AA", syllables={})
    assert poem_rule(couplet, {}).score("cat", "\n".join(GOOD[:2])) == 1.0
    assert poem_rule(couplet, {}).score("cat", "\n".join(GOOD)) == pytest.approx((0 + 1 + 1) / 3)


def test_lines_are_words_without_signs() -> None:
    assert lines_of(" One, two!\n\n ...\n Don’t stop") == [("one", "two"), ("don't", "stop")]
