from tasks.core.text_stats import word_count
from tasks.evals.report import length_counts


def test_word_count_leaves_punctuation_out() -> None:
    assert word_count(" It 's not , well ... good") == 5


def test_length_counts_have_no_gaps() -> None:
    assert length_counts([3, 1, 3]) == [(1, 1), (2, 0), (3, 2)]
    assert length_counts([]) == []
