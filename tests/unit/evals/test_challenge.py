"""Pairs made by rule: each category on sentences worked by hand, and scorers that are wrong in one way."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tasks.core.rows import Preference, Rating, write_rows
from tasks.evals.challenge import (
    CATEGORIES,
    FILLERS,
    PRAISE,
    ChallengePair,
    challenge_pairs,
    challenge_samples,
    load_challenge,
    write_challenge,
)

IS = "The film is a quiet joy for all of us."
ITS = "It's warm and wise, and its jokes were kind."
NONE = "A film that nobody is going to forget for years."
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def sentence(number: int) -> str:
    return f"Film {number} is " + " ".join(WORDS[: 6 + number % 4])


SENTENCES = [sentence(number) for number in range(60)]
PAIRS = challenge_pairs([("", text) for text in SENTENCES], 0, [float(number) for number in range(60)])


def made(text: str, category: str) -> str | None:
    others = [("", sentence(number)) for number in range(62)]
    pairs = challenge_pairs([("", text), *others], 0, [5.0] + [0.0] * 62)
    found = [pair.wrong for pair in pairs if pair.category == category and pair.right == text]
    return found[0] if found else None


def accuracies(tmp_path: Path, score: Callable[[str], float]) -> dict[str, float]:
    scores = torch.tensor([float(score(response)) for _, response in challenge_samples(PAIRS)])
    return write_challenge(tmp_path / "challenge.csv", PAIRS, scores)


@pytest.mark.parametrize(
    ("text", "category", "expected"),
    [
        (IS, "negation", "The film is not a quiet joy for all of us."),
        (ITS, "negation", "It's not warm and wise, and its jokes were kind."),
        (NONE, "negation", None),
        (IS, "repetition", f"{IS} all of us. all of us."),
        (ITS, "repetition", f"{ITS} jokes were kind. jokes were kind."),
        (IS, "truncated", "The film is a quiet"),
        (ITS, "truncated", "It's warm and wise,"),
    ],
)
def test_each_category_by_hand(text: str, category: str, expected: str | None) -> None:
    assert made(text, category) == expected


@pytest.mark.parametrize("text", [IS, ITS])
def test_what_is_drawn_at_random_keeps_its_rule(text: str) -> None:
    scrambled, praise, padded = (made(text, category) or "" for category in ("scrambled", "praise", "length"))
    assert sorted(scrambled.split()) == sorted(text.split())
    assert scrambled != text
    assert len(praise.split()) == len(text.split())
    assert set(praise.split()) <= set(PRAISE)
    assert padded in {f"{text} {filler}" for filler in FILLERS}
    assert made(text, "scrambled") == scrambled, "the seed decides"


def test_only_the_best_rated_third_is_used_and_each_sentence_is_right() -> None:
    assert {pair.right for pair in PAIRS} == set(SENTENCES[40:])
    assert [sum(pair.category == category for pair in PAIRS) for category in CATEGORIES] == [20] * 6


@pytest.mark.parametrize(
    ("score", "fails", "passes"),
    [
        (len, {"length", "repetition", "negation", "scrambled"}, {"truncated"}),
        (lambda text: -len(text), {"truncated", "scrambled"}, {"length", "repetition", "negation"}),
        (lambda text: sum(word in PRAISE for word in text.split()), {*CATEGORIES} - {"length"}, {"length"}),
        (lambda text: text in SENTENCES, set(), {*CATEGORIES}),
    ],
    ids=["longer", "shorter", "praise", "right"],
)
def test_a_scorer_fails_where_it_has_its_weakness(
    tmp_path: Path, score: Callable[[str], float], fails: set[str], passes: set[str]
) -> None:
    """Equal scores are wrong but in the category of length."""
    found = accuracies(tmp_path, score)
    assert {category for category in fails if found[f"challenge/{category}"] != 0} == set()
    assert {category for category in passes if found[f"challenge/{category}"] != 1} == set()


def test_the_table_has_wilson_s_interval(tmp_path: Path) -> None:
    """15 of 20: centre (0.75 + 1.92073/20) / (1 + 3.84146/20), Wilson 1927; checked: 0.531299 to 0.888140."""
    pairs = [ChallengePair("truncated", "", "a", "b")] * 20
    found = write_challenge(tmp_path / "t.csv", pairs, torch.tensor([1.0] * 15 + [0.0] * 25))
    assert found == {"challenge_accuracy": 0.75, "challenge/truncated": 0.75}
    (row,) = csv.DictReader((tmp_path / "t.csv").read_text().splitlines())
    assert (row["category"], row["pairs"], float(row["accuracy"])) == ("truncated", "20", 0.75)
    assert (float(row["low"]), float(row["high"])) == pytest.approx((0.531299, 0.888140), abs=1e-5)


def test_pairs_are_made_of_chosen_texts_without_the_categories_of_liking(tmp_path: Path) -> None:
    rows = [Preference(id=str(n), prompt="Say so:", chosen=f" {sentence(n)}", rejected="no") for n in range(30)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    found = load_challenge(tmp_path / "none.jsonl", tmp_path / "pairs.jsonl", 0)
    assert {pair.category for pair in found} == {"scrambled", "repetition", "truncated", "length"}
    assert all(pair.prompt == "Say so:" and pair.right[0] == pair.wrong[0] == " " != pair.wrong[1] for pair in found)


@pytest.mark.parametrize("texts", [SENTENCES[:19], [f"{text}\nAnd more." for text in SENTENCES], ["Yes."] * 60])
def test_few_or_short_texts_and_conversations_give_an_empty_table(tmp_path: Path, texts: list[str]) -> None:
    write_rows(tmp_path / "r.jsonl", [Rating(id=str(n), text=text, ratings=(1.0,)) for n, text in enumerate(texts)])
    found = load_challenge(tmp_path / "r.jsonl", tmp_path / "none.jsonl", 0)
    assert found == load_challenge(tmp_path / "none.jsonl", tmp_path / "none.jsonl", 0) == []
    assert write_challenge(tmp_path / "c.csv", found, torch.empty(0)) == {}
    assert (tmp_path / "c.csv").read_text() == "category,pairs,accuracy,low,high\n"
