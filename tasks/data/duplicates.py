"""Exact and near duplicates, by MinHash and locality-sensitive hashing from datasketch, then by exact comparison."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from datasketch import MinHash, MinHashLSH

from tasks.core.text_stats import ngrams, tokenize_words

__all__ = ["near_duplicates", "shingles", "similarity"]

NGRAM = 3
_PERMUTATIONS = 128
_SEED = 1
# Hashing only proposes candidates: at this share of the threshold it misses practically none of the true pairs, and
# every candidate is then compared exactly, so that no wrong one counts.
_LSH_THRESHOLD_FACTOR = 0.7


def shingles(text: str) -> frozenset[str]:
    """The text's word trigrams, without case or punctuation; a shorter text is one shingle of all its words."""
    tokens = tokenize_words(text)
    grams = ngrams(tokens, NGRAM) or [tuple(tokens or text.split())]
    return frozenset(" ".join(gram) for gram in grams)


def similarity(one: frozenset[str], other: frozenset[str]) -> float:
    """Jaccard similarity of two sets: |A ∩ B| / |A ∪ B|, in [0, 1]."""
    return len(one & other) / len(one | other)


def near_duplicates(texts: Sequence[str], threshold: float) -> dict[int, int]:
    """Index of each text that nearly repeats an earlier kept one → index of that one.

    Texts are judged in their order, so that texts added at the end never change the verdict on earlier ones. No two
    kept texts reach the threshold, up to what hashing misses. At threshold 1 only equal texts count.
    """
    if threshold >= 1:
        first: dict[str, int] = {}
        return {index: first[text] for index, text in enumerate(texts) if first.setdefault(text, index) != index}
    sets = [shingles(text) for text in texts]
    hashes = MinHash.bulk(
        [[gram.encode() for gram in sorted(grams)] for grams in sets],
        num_perm=_PERMUTATIONS, seed=_SEED, hashfunc=_hash32,
    )  # fmt: skip
    index = MinHashLSH(threshold=_LSH_THRESHOLD_FACTOR * threshold, num_perm=_PERMUTATIONS)
    repeated: dict[int, int] = {}
    for number, minhash in enumerate(hashes):
        match = _closest(sets, number, index.query(minhash), threshold)
        if match is None:
            index.insert(number, minhash, check_duplication=False)
        else:
            repeated[number] = match
    return repeated


def _closest(sets: Sequence[frozenset[str]], number: int, candidates: Iterable[int], threshold: float) -> int | None:
    """The most similar candidate at or above the threshold; of equals the earliest."""
    scored = [(-similarity(sets[number], sets[other]), other) for other in candidates]
    best = min(scored, default=(0.0, -1))
    return best[1] if -best[0] >= threshold else None


def _hash32(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "big")
