"""Validation, quarantine, normal form and length bounds; near duplicates by definition; splits as functions of text."""

import hashlib
import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from tasks.core.errors import DataError
from tasks.core.rows import Demonstration, Preference, Prompt, Rating, Row
from tasks.data.cleaning import (
    CleanResult,
    clean,
    filter_by_length,
    hash_uniform,
    in_stable_order,
    near_duplicates,
    rater_half,
    shingles,
    similarity,
    split_keys,
    split_of,
    text_key,
)
from tests.support.collected import PREPARE, write_collected


def test_each_malformed_row_is_quarantined_with_file_line_reason_and_text(tmp_path: Path) -> None:
    rows = [
        {"id": "1", "text": "fine", "ratings": [1]},
        {"id": "2", "text": "none"},
        {"raw": "{broken", "error": "not JSON"},
        {"id": "1", "text": "again", "ratings": [1]},
        {"id": "5", "text": "also fine", "ratings": [1]},
        {"id": "6", "text": " \t", "ratings": [1]},
        {"id": "7", "text": "what", "ratings": [float("nan")]},
        {"id": "8", "text": 5, "ratings": ["high"]},
    ]
    cleaned = clean(write_collected(tmp_path, "ratings", rows))
    assert [row.id for row in cleaned.rows] == ["1", "5"]
    assert cleaned.collected == 8
    places = [("mine", "mine.jsonl", line) for line in (2, 3, 4, 6, 7, 8)]
    assert [(row["source"], row["file"], row["line"]) for row in cleaned.quarantine] == places
    reasons = [str(row["reason"]) for row in cleaned.quarantine]
    assert reasons[0].startswith("ratings: Field required")
    assert reasons[1:3] == ["not JSON", "id: '1' is taken by an earlier row: each needs its own, or none"]
    assert reasons[3].startswith("text: String should have at least 1 character")
    assert reasons[4].startswith("ratings.0: Input should be a finite number")
    assert "text: Input should be a valid string (got '5')" in reasons[5]
    assert "ratings.0: Input should be a valid number" in reasons[5]
    assert cleaned.quarantine[1]["raw"] == "{broken"
    assert json.loads(str(cleaned.quarantine[2]["raw"])) == rows[3]


def test_texts_get_one_form(tmp_path: Path) -> None:
    content = {"id": "1", "text": "  cafe\u0301\r\n  noir\x00 ", "ratings": [1, 2]}
    (row,) = clean(write_collected(tmp_path, "ratings", [content])).rows
    assert row == Rating(id="1", text="café noir", ratings=(1.0, 2.0))


@pytest.mark.parametrize(
    ("prompt", "response", "joined"),
    [
        ("Why?", "So.", "Why? So."),
        ("Why?", " So. ", "Why? So."),
        ("Why?\r\n", "a\r\n  b\n", "Why?\na\n  b"),
        ("", "So.", "So."),
    ],
)
def test_prompt_and_response_make_one_text_with_its_inner_white_space(
    tmp_path: Path, prompt: str, response: str, joined: str
) -> None:
    content = {"id": "1", "prompt": prompt, "response": response}
    (row,) = clean(write_collected(tmp_path, "demonstrations", [content])).rows
    assert isinstance(row, Demonstration)
    assert row.prompt + row.response == joined


def kept(*rows: Row) -> tuple[list[str], dict[str, int]]:
    cleaned, bounds = CleanResult(rows=list(rows)), PREPARE.model_copy(update={"min_words": 2, "max_words": 4})
    return [row.id for row in filter_by_length(cleaned, bounds)], dict(cleaned.dropped)


def test_length_bounds_include_their_ends_and_count_what_they_drop() -> None:
    texts = ["one", "one two", "one two three four", "one two three four five"]
    rows = [Rating(id=str(index), text=text, ratings=(1,)) for index, text in enumerate(texts)]
    assert kept(*rows) == (["1", "2"], {"too_short": 1, "too_long": 1})
    prompts = [Prompt(id=str(index), prompt=text) for index, text in enumerate(texts)]
    assert kept(*prompts) == (["0", "1", "2"], {"too_long": 1})
    whole = Demonstration(id="d", prompt="one two three", response=" four five")
    assert kept(whole) == ([], {"too_long": 1})


def test_preferences_that_differ_only_at_their_end_are_kept() -> None:
    late = Preference(id="late", prompt="p", chosen="a b c d e f X", rejected="a b c d e f Y")
    assert kept(late) == (["late"], {})


def test_rows_that_share_a_prompt_share_a_key() -> None:
    one = Preference(id="1", prompt="p", chosen="a", rejected="b")
    other = Demonstration(id="2", prompt="p", response="c")
    assert text_key(one) == text_key(other) == text_key(Prompt(id="3", prompt="p")) == "p"
    assert text_key(one.model_copy(update={"prompt": ""})) == "a\nb"
    assert text_key(other.model_copy(update={"prompt": ""})) == "c"
    assert text_key(Rating(id="2", text="t", ratings=(1,))) == "t"


def test_a_group_decides_the_split_of_its_rows_and_of_others_with_their_texts() -> None:
    rows = [
        Prompt(id="1", prompt="p", group="g"),
        Prompt(id="2", prompt="q", group="g"),
        Preference(id="3", prompt="p", chosen="a", rejected="b"),
        Rating(id="4", text="t", ratings=(1,), group="h"),
        Demonstration(id="5", prompt="alone", response="r"),
        Demonstration(id="6", prompt="t", response="r", group="i"),
        Rating(id="7", text="u", ratings=(1,), group="i"),
    ]
    key = split_keys(rows)
    assert [key(row) for row in rows] == ["g", "g", "g", "h", "alone", "h", "h"], "t joins the groups h and i"
    bridge = Prompt(id="8", prompt="q", group="i")
    assert len({split_keys([*rows, bridge])(row) for row in rows}) == 2, "q joins g and i, so all but `alone` are one"


def test_without_cards_or_rows_the_message_names_the_stage(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no data cards: run stage collect first"):
        clean(tmp_path)
    folder = write_collected(tmp_path, "prompts", [])
    (folder / "rows" / "mine.jsonl").unlink()
    with pytest.raises(DataError, match=r"mine\.jsonl does not exist although there is a card for it"):
        clean(folder)


# -- duplicates --------------------------------------------------------------------------------------------------


def test_similarity_of_word_trigrams_by_hand() -> None:
    one, other = shingles("A B c, d e!"), shingles("a b c d f")
    assert one == {"a b c", "b c d", "c d e"}
    assert similarity(one, other) == 2 / 4
    assert shingles("Two words") == {"two words"}
    assert shingles("?!") == {"?!"}


SUMS = ["what is 3 + 4 ?", "what is 3 - 4 ?", "what is 3 + 4 ?", "what is 3 + 4 ?"]


@pytest.mark.parametrize(
    ("texts", "threshold", "repeated"),
    [
        (["a film that you will like", "quite another text about it", "A film, that you will like!"], 0.7, {2: 0}),
        (["a b c d e", "a b c d f"], 0.5, {1: 0}),
        (["a b c d e", "a b c d f"], 0.51, {}),
        (SUMS, 1.0, {2: 0, 3: 0}),
    ],
    ids=["case and punctuation hide nothing", "the threshold counts", "below it", "at 1 only equal texts count"],
)
def test_a_repeat_points_to_the_first(texts: list[str], threshold: float, repeated: dict[int, int]) -> None:
    assert near_duplicates(texts, threshold) == repeated


def mutated(words: list[str], changes: int, rng: random.Random) -> str:
    words = list(words)
    for place in rng.sample(range(len(words)), changes):
        words[place] = f"new{rng.randrange(10**6)}"
    return " ".join(words)


@pytest.mark.parametrize("threshold", [0.4, 0.7, 0.9])
def test_no_two_kept_texts_reach_the_threshold_and_every_dropped_one_does(threshold: float) -> None:
    rng = random.Random(0)
    texts = []
    for _ in range(60):
        words = [f"w{rng.randrange(400)}" for _ in range(rng.randrange(8, 30))]
        texts += [mutated(words, changes, rng) for changes in (0, 0, 1, 2, 4)]
    rng.shuffle(texts)
    repeated = near_duplicates(texts, threshold)
    sets = [shingles(text) for text in texts]
    for index, other in repeated.items():
        assert other < index
        assert other not in repeated
        assert similarity(sets[index], sets[other]) >= threshold
    left = [sets[index] for index in range(len(texts)) if index not in repeated]
    assert all(similarity(*pair) < threshold for pair in itertools.combinations(left, 2)), "too few candidates"
    assert len(repeated) >= 60


def words(count: int, rng: random.Random) -> str:
    return " ".join(f"w{rng.randrange(2000)}" for _ in range(count))


@pytest.mark.parametrize("templates", [1, 3, 8], ids="{} templates".format)
def test_texts_of_a_template_are_compared_by_what_is_their_own(templates: int) -> None:
    rng = random.Random(templates)
    frames = [(words(60, rng), words(60, rng)) for _ in range(templates)]
    owns = [words(12, rng) for _ in range(200)]
    texts = [" ".join([*frames[n % templates][:1], own, *frames[n % templates][1:]]) for n, own in enumerate(owns)]
    assert near_duplicates(texts, 0.7) == {}
    again = [text.replace(own, f"{own} so") for text, own in zip(texts[:20], owns, strict=False)]
    assert near_duplicates([*texts, *again], 0.7) == {200 + index: index for index in range(20)}


def test_one_question_under_two_system_prompts_is_two_texts() -> None:
    rng = random.Random(0)
    prompts, questions = [words(100, rng) for _ in range(3)], [words(16, rng) for _ in range(30)]
    assert not near_duplicates([f"{prompt} {question}" for prompt in prompts for question in questions], 0.7)


# -- splits ------------------------------------------------------------------------------------------------------

SHARES = PREPARE.model_copy(update={"validation_share": 0.1, "test_share": 0.2, "gold_share": 0.4})
TEXTS = [f"text number {number}" for number in range(20_000)]


def test_the_number_is_the_documented_hash() -> None:
    digest = hashlib.blake2b(b"3\x1fsplit\x1fcaf\xc3\xa9", digest_size=8).hexdigest()
    assert hash_uniform("café", 3, "split") == pytest.approx(int(digest, 16) / 2**64)


def test_shares_are_met_and_halves_do_not_depend_on_splits() -> None:
    counts = Counter((split_of(text, SHARES, 0), rater_half(text, SHARES, 0)) for text in TEXTS)
    for split, share in {"train": 0.7, "validation": 0.1, "test": 0.2}.items():
        for half, part in {"proxy": 0.6, "gold": 0.4}.items():
            # Five standard deviations of a binomial share of 20,000: at most 5·√(0.25/20000) < 0.018.
            assert counts[split, half] / len(TEXTS) == pytest.approx(share * part, abs=0.018)


def test_another_seed_moves_texts_and_the_same_one_does_not() -> None:
    first, again, other = ([split_of(text, SHARES, seed) for text in TEXTS[:500]] for seed in (0, 0, 1))
    assert first == again != other


def test_a_larger_test_share_only_adds_texts_to_the_test_split() -> None:
    larger = SHARES.model_copy(update={"test_share": 0.3})
    before = {text for text in TEXTS[:2000] if split_of(text, SHARES, 0) == "test"}
    assert before < {text for text in TEXTS[:2000] if split_of(text, larger, 0) == "test"}


def test_the_order_is_not_the_given_one() -> None:
    order = in_stable_order([(text, text) for text in TEXTS[:50]], 0)
    assert order != TEXTS[:50]
    assert sorted(order) == sorted(TEXTS[:50])
