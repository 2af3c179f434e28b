"""Validate, quarantine and normalise collected rows; find duplicates, and assign texts to splits by their hash."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import ValidationError

from tasks.core.errors import DataError
from tasks.core.rows import ROW_TYPES, Demonstration, Preference, Prompt, Rating, Row, Split, format_validation_error
from tasks.core.text_stats import ngrams, tokenize_words

if TYPE_CHECKING:
    from tasks.config.data import PrepareParams

__all__ = [
    "HALVES", "CleanResult", "Half", "check_quarantine", "clean", "drop_duplicates", "filter_by_length",
    "hash_uniform", "in_stable_order", "near_duplicates", "rater_half", "shingles", "similarity", "split_keys",
    "split_of", "text_key",
]  # fmt: skip

Half = Literal["proxy", "gold"]  # of the rated texts: the pipeline's, and what only the gold judge sees
HALVES: tuple[Half, ...] = ("proxy", "gold")

_RAW_CHARACTERS = 2000  # of a quarantined row that are kept; enough to find it, too few to fill a disk
NGRAM = 3
_PERMUTATIONS = 128
_SEED = 1
# Hashing only proposes candidates: at this share of the threshold it misses practically none of the true pairs, and
# every candidate is then compared exactly, so that no wrong one counts.
_LSH_THRESHOLD_FACTOR = 0.7
# What so many texts have in common is their template. Of prompts that people wrote freely (GSM8K, HH), 2 % share about
# a hundred trigrams, such as "how much money"; leaving those out changes one verdict in 11,000.
_TEMPLATE_TEXTS = 10
_TEMPLATE_SHARE = 0.02

TextT = TypeVar("TextT", bound=object)


@dataclass
class CleanResult:
    """Valid rows in the order of the sources, and a {source, file, line, reason, raw} per malformed one.

    `dropped`: reason → number of valid rows left out; `collected`: number of all rows; `kinds`: those of the sources.
    """

    rows: list[Row] = field(default_factory=list)
    quarantine: list[dict[str, object]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    collected: int = 0
    kinds: set[str] = field(default_factory=set)


def clean(collect: Path) -> CleanResult:
    """Validate and normalise everything that stage collect wrote.

    Raises:
        DataError: there are no cards, or a file of rows is missing.
    """
    cards = sorted((collect / "cards").glob("*.json"))
    if not cards:
        raise DataError(f"{collect / 'cards'} holds no data cards: run stage collect first (`rlhf run`)")
    result, seen = CleanResult(), set[str]()
    for card in cards:
        source = json.loads(card.read_text(encoding="utf-8"))
        row_type = ROW_TYPES[source["type"]]
        result.kinds.add(source["kind"])
        path = collect / "rows" / f"{card.stem}.jsonl"
        if not path.is_file():
            raise DataError(f"{path} does not exist although there is a card for it: run stage collect again")
        with path.open(encoding="utf-8") as file:
            for envelope in map(json.loads, file):
                result.collected += 1
                _route_row(envelope, row_type, card.stem, seen, result)
    return result


def check_quarantine(cleaned: CleanResult, file: Path, bound: float) -> None:
    """Check that the share of malformed rows is within the bound.

    Raises:
        DataError: with the counts, the file, and the first reasons.
    """
    bad = len(cleaned.quarantine)
    if cleaned.collected and bad / cleaned.collected > bound:
        shown = "\n".join(f"  {row['file']}:{row['line']}: {row['reason']}" for row in cleaned.quarantine[:5])
        raise DataError(
            f"{bad} of {cleaned.collected} rows ({bad / cleaned.collected:.2%}) are malformed, more than "
            f"prepare.max_quarantine_share allows ({bound:.2%}); the first ones:\n{shown}\nAll of them, with the raw "
            f"rows, are in {file}: correct the source, or raise the bound"
        )


def text_key(row: Row) -> str:
    """The text by which the row is compared and ordered: its prompt where rows may share one, else its whole text."""
    if isinstance(row, Rating):
        return row.text
    if isinstance(row, Preference) and not row.prompt:
        return f"{row.chosen}\n{row.rejected}"
    if isinstance(row, Demonstration) and not row.prompt:
        return row.response
    return getattr(row, "prompt", "")


def split_keys(rows: Iterable[Row]) -> Callable[[Row], str]:
    """Decide by what the split of each row is hashed: by its `text_key`, or its group where that text has one.

    Groups that share a text count as one, so that neither a text nor a group is in two splits.
    """
    group_of: dict[str, str] = {}
    merged: dict[str, str] = {}  # group → earlier one with a text in common

    def first_of(group: str) -> str:
        while group in merged:
            group = merged[group]
        return group

    for row in rows:
        if (given := getattr(row, "group", None)) is not None:
            group = first_of(given)
            earlier = first_of(group_of.setdefault(text_key(row), group))
            if earlier != group:
                merged[group] = earlier

    def split_key(row: Row) -> str:
        text = text_key(row)
        return first_of(group_of[text]) if text in group_of else text

    return split_key


def full_texts(row: Row) -> list[str]:
    """The complete texts in a row: one, or the two sides of a preference."""
    if isinstance(row, Rating):
        return [row.text]
    if isinstance(row, Demonstration):
        return [row.prompt + row.response]
    if isinstance(row, Preference):
        return [row.prompt + row.chosen, row.prompt + row.rejected]
    return [getattr(row, "prompt", "")]


def filter_by_length(cleaned: CleanResult, params: PrepareParams) -> list[Row]:
    """Keep the rows whose length fits; count the others.

    Rated texts and demonstrations keep to both bounds, prompts to the upper one. A preference is kept at any length
    unless `max_preference_words` says otherwise.
    """
    kept = []
    for row in cleaned.rows:
        if reason := _length_problem(row, params):
            cleaned.dropped[reason] += 1
        else:
            kept.append(row)
    return kept


def _length_problem(row: Row, params: PrepareParams) -> str | None:
    if isinstance(row, Preference):
        longest, bound = max(len(text.split()) for text in full_texts(row)), params.max_preference_words
        return "too_long" if bound is not None and longest > bound else None
    words = len(full_texts(row)[0].split())
    if words < params.min_words and not isinstance(row, Prompt):
        return "too_short"
    return "too_long" if words > params.max_words else None


def _route_row(envelope: dict[str, Any], row_type: type[Row], source: str, seen: set[str], result: CleanResult) -> None:
    """Route one collected row to the valid rows or to quarantine."""
    row = _validated(envelope, row_type)
    if isinstance(row, Row) and row.id in seen:
        row = f"id: {row.id!r} is taken by an earlier row: each needs its own, or none"
    if isinstance(row, Row):
        seen.add(row.id)
        result.rows.append(row)
        return
    raw = envelope.get("raw") or json.dumps(envelope.get("row"), ensure_ascii=False)
    origin = {"source": source, "file": envelope["file"], "line": envelope["line"]}
    result.quarantine.append({**origin, "reason": row, "raw": raw[:_RAW_CHARACTERS]})


def _validated(envelope: dict[str, Any], row_type: type[Row]) -> Row | str:
    """The normalised row, or the reason it is invalid. Validated before and after normalising."""
    if "error" in envelope:
        return str(envelope["error"])
    try:
        row = row_type.model_validate(envelope["row"])
        return row_type.model_validate(_normalised(row))
    except ValidationError as error:
        return format_validation_error(error)


def _normalised(row: Row) -> dict[str, Any]:
    """The row's fields with texts in Unicode NFC; line ends are \\n, and nothing trails.

    A rated text becomes one line with single spaces. Elsewhere inner white space is meaning (code, dialogues, verse).
    A blank prompt is none.
    A response that would stick to the last word of its prompt gets the space that parts them.
    """
    content = row.model_dump()
    for name in ("text", "prompt", "response", "chosen", "rejected"):
        if name in content:
            content[name] = _normalise_unicode(content[name])
    if "text" in content:
        content["text"] = " ".join(content["text"].split())
    if "prompt" in content and not content["prompt"].strip():
        content["prompt"] = ""
    for name in ("response", "chosen", "rejected"):
        if name in content:
            content[name] = _with_leading_space(content.get("prompt", ""), content[name].rstrip())
    return content


def _normalise_unicode(text: str) -> str:
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")


def _with_leading_space(prompt: str, response: str) -> str:
    if not prompt.strip() or not response or prompt[-1].isspace() or response[0].isspace():
        return response
    return f" {response}"


def drop_duplicates(rows: list[Row], cleaned: CleanResult, threshold: float) -> list[Row]:
    """Drop and count duplicate rows, and rows whose key nearly duplicates an earlier, different one.

    Rows of one type with one key but different content (two answers to a prompt) stay, and stay together. So do labels
    of different people that say the same.
    """
    unique: dict[tuple[object, ...], Row] = {}
    for row in rows:
        texts = [*full_texts(row), getattr(row, "objective", None) or ""]
        identity = (type(row), "\x1f".join(texts), getattr(row, "labelled_by", None))
        cleaned.dropped["duplicate"] += identity in unique
        unique.setdefault(identity, row)
    keys = list(dict.fromkeys(text_key(row) for row in unique.values()))
    repeated = {keys[index] for index in near_duplicates(keys, threshold)}
    kept = [row for row in unique.values() if text_key(row) not in repeated]
    cleaned.dropped["near_duplicate"] += len(unique) - len(kept)
    return kept


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

    Two texts repeat each other if they are similar as they are, and also without what many texts share: prompts that
    fill one template, or follow one system prompt, differ in what is their own. Texts are judged in their order, so
    that texts added at the end never change the verdict on earlier ones, but by what they make shared. No two kept
    texts reach the threshold, up to what hashing misses. At threshold 1 only equal texts count.
    """
    if threshold >= 1:
        first: dict[str, int] = {}
        return {index: first[text] for index, text in enumerate(texts) if first.setdefault(text, index) != index}
    from datasketch import MinHash, MinHashLSH  # slow to import, and every run compares data with params.yaml

    whole = [shingles(text) for text in texts]
    shared = shared_shingles(whole)
    own = [grams - shared or grams for grams in whole]
    hashes = MinHash.bulk(
        [[gram.encode() for gram in sorted(grams)] for grams in own],
        num_perm=_PERMUTATIONS, seed=_SEED, hashfunc=_hash32,
    )  # fmt: skip
    index = MinHashLSH(threshold=_LSH_THRESHOLD_FACTOR * threshold, num_perm=_PERMUTATIONS)
    repeated: dict[int, int] = {}
    for number, minhash in enumerate(hashes):
        match = _closest((whole, own), number, index.query(minhash), threshold)
        if match is None:
            index.insert(number, minhash, check_duplication=False)
        else:
            repeated[number] = match
    return repeated


def shared_shingles(sets: Sequence[frozenset[str]]) -> frozenset[str]:
    """Find the shingles of a template: those in many of the texts, by number and by share."""
    counts = Counter(gram for grams in sets for gram in grams)
    return frozenset(
        gram for gram, count in counts.items() if count >= max(_TEMPLATE_TEXTS, _TEMPLATE_SHARE * len(sets))
    )


def _closest(
    views: Sequence[Sequence[frozenset[str]]], number: int, candidates: Iterable[int], threshold: float
) -> int | None:
    """The candidate that is most similar by its least view, at or above the threshold; of equals the earliest."""
    scored = [(-min(similarity(sets[number], sets[other]) for sets in views), other) for other in candidates]
    best = min(scored, default=(0.0, -1))
    return best[1] if -best[0] >= threshold else None


def _hash32(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "big")


def hash_uniform(text: str, seed: int, purpose: str) -> float:
    """Hash the arguments to a number in [0, 1); different purposes are independent."""
    digest = hashlib.blake2b(f"{seed}\x1f{purpose}\x1f{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_of(key: str, params: PrepareParams, seed: int) -> Split:
    value = hash_uniform(key, seed, "split")
    if value < params.test_share:
        return "test"
    return "validation" if value < params.test_share + params.validation_share else "train"


def rater_half(key: str, params: PrepareParams, seed: int) -> Half:
    return "gold" if hash_uniform(key, seed, "half") < params.gold_share else "proxy"


def in_stable_order(items: Iterable[tuple[str, TextT]], seed: int) -> list[TextT]:
    """The items of (text, item) pairs in a pseudo-random order that additions do not disturb."""
    return [item for _, item in sorted(items, key=lambda pair: (hash_uniform(pair[0], seed, "order"), pair[0]))]
