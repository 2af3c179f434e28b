"""Splits are a function of the text, in the shares asked for, and independent of each other."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest

from tasks.config.data import PrepareParams
from tasks.data.cleaning import hash_uniform, in_stable_order, rater_half, split_of

PARAMS = PrepareParams(
    prompt_words=1, min_words=2, max_words=9, near_duplicate_threshold=0.7, validation_share=0.1, test_share=0.2,
    gold_share=0.4, max_quarantine_share=0.0,
)  # fmt: skip
TEXTS = [f"text number {number}" for number in range(20_000)]


def test_the_number_is_the_documented_hash() -> None:
    digest = hashlib.blake2b(b"3\x1fsplit\x1fcaf\xc3\xa9", digest_size=8).hexdigest()
    assert hash_uniform("café", 3, "split") == pytest.approx(int(digest, 16) / 2**64)


def test_shares_are_met_and_halves_do_not_depend_on_splits() -> None:
    counts = Counter((split_of(text, PARAMS, 0), rater_half(text, PARAMS, 0)) for text in TEXTS)
    shares = {"train": 0.7, "validation": 0.1, "test": 0.2}
    for split, share in shares.items():
        for half, part in {"proxy": 0.6, "gold": 0.4}.items():
            # Five standard deviations of a binomial share of 20,000: at most 5·√(0.25/20000) < 0.018.
            assert counts[split, half] / len(TEXTS) == pytest.approx(share * part, abs=0.018)


def test_another_seed_moves_texts_and_the_same_one_does_not() -> None:
    first = [split_of(text, PARAMS, 0) for text in TEXTS[:500]]
    assert first == [split_of(text, PARAMS, 0) for text in TEXTS[:500]]
    assert first != [split_of(text, PARAMS, 1) for text in TEXTS[:500]]


def test_a_larger_test_share_only_adds_texts_to_the_test_split() -> None:
    larger = PARAMS.model_copy(update={"test_share": 0.3})
    before = {text for text in TEXTS[:2000] if split_of(text, PARAMS, 0) == "test"}
    assert before < {text for text in TEXTS[:2000] if split_of(text, larger, 0) == "test"}


def test_the_order_is_not_the_given_one_and_additions_leave_it_alone() -> None:
    order = in_stable_order([(text, text) for text in TEXTS[:50]], 0)
    assert order != TEXTS[:50]
    assert sorted(order) == sorted(TEXTS[:50])
    more = in_stable_order([(text, text) for text in reversed(TEXTS[:80])], 0)
    assert [text for text in more if text in set(order)] == order
