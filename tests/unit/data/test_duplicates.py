"""Near duplicates against an exhaustive comparison by definition."""

from __future__ import annotations

import itertools
import random

import pytest

from tasks.data.cleaning import near_duplicates, shingles, similarity


def test_similarity_of_word_trigrams_by_hand() -> None:
    one, other = shingles("A B c, d e!"), shingles("a b c d f")
    assert one == {"a b c", "b c d", "c d e"}
    assert similarity(one, other) == 2 / 4
    assert shingles("Two words") == {"two words"}
    assert shingles("?!") == {"?!"}


def test_a_repeat_points_to_the_first_and_case_or_punctuation_does_not_hide_it() -> None:
    texts = ["a film that you will like", "quite another text about nothing", "A film, that you will like!"]
    assert near_duplicates(texts, 0.7) == {2: 0}


def test_the_threshold_itself_counts_as_a_repeat() -> None:
    texts = ["a b c d e", "a b c d f"]
    assert near_duplicates(texts, 0.5) == {1: 0}
    assert near_duplicates(texts, 0.51) == {}


def test_at_threshold_one_only_equal_texts_count() -> None:
    texts = ["what is 3 + 4 ?", "what is 3 - 4 ?", "what is 3 + 4 ?", "what is 3 + 4 ?"]
    assert near_duplicates(texts, 1.0) == {2: 0, 3: 0}


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
    kept = [index for index in range(len(texts)) if index not in repeated]
    missed = [pair for pair in itertools.combinations(kept, 2) if similarity(*(sets[i] for i in pair)) >= threshold]
    assert not missed, "hashing proposed too few candidates"
    assert len(repeated) >= 60


def test_texts_added_at_the_end_change_no_earlier_verdict() -> None:
    rng = random.Random(1)
    words = [f"w{number}" for number in range(20)]
    texts = [mutated(words, rng.randrange(4), rng) for _ in range(40)]
    first = near_duplicates(texts[:25], 0.5)
    assert {index: other for index, other in near_duplicates(texts, 0.5).items() if index < 25} == first
