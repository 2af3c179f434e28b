import pytest

from tasks.core.text_stats import distinct_n, ngrams, repetition_rate, tokenize_words, word_count


def test_words_are_lower_case_and_without_punctuation() -> None:
    assert tokenize_words("It's GOOD -- really, good! 2nd-rate?") == ["it's", "good", "really", "good", "2nd", "rate"]
    assert word_count(" It 's not , well ... good") == 5
    assert tokenize_words(" ... !? -- ") == []


def test_ngrams_are_neighbours_in_order() -> None:
    assert ngrams(["a", "b", "c"], 2) == [("a", "b"), ("b", "c")]
    assert ngrams(["a"], 2) == []


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("good good good good", 2 / 3),  # three pairs, all the same one: two repeat
        ("a film a film a film", 3 / 5),  # a-film, film-a, a-film, film-a, a-film: three of five repeat
        ("a film, A FILM; a film!", 3 / 5),  # neither case nor punctuation hides it
        ("every word here differs", 0.0),
        ("so so", 0.0),  # a single pair has nothing to repeat
        ("one", 0.0),
        ("", 0.0),
    ],
)
def test_repetition_rate_counts_repeated_pairs(text: str, share: float) -> None:
    assert repetition_rate(text) == pytest.approx(share)


def test_distinct_n_is_over_all_texts_together() -> None:
    texts = ["a good film", "a good day"]
    assert distinct_n(texts, 1) == pytest.approx(4 / 6)  # a, good, film, day of six words
    assert distinct_n(texts, 2) == pytest.approx(3 / 4)  # a-good, good-film, good-day of four pairs


def test_no_pair_crosses_from_one_text_to_the_next() -> None:
    assert distinct_n(["a b", "a b"], 2) == 0.5  # with a crossing pair b-a it would be 2/3
    assert distinct_n(["a", "b"], 2) == 0.0
