"""Assign texts to splits and halves by their hash, so that new texts never move old ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    from tasks.config.data import PrepareParams

__all__ = ["HALVES", "SPLITS", "Half", "Split", "hash_uniform", "in_stable_order", "rater_half", "split_of"]

Split = Literal["train", "validation", "test"]
Half = Literal["proxy", "gold"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
HALVES: tuple[Half, ...] = ("proxy", "gold")

TextT = TypeVar("TextT", bound=object)


def hash_uniform(text: str, seed: int, purpose: str) -> float:
    """Hash the arguments to a number in [0, 1); different purposes are independent."""
    digest = hashlib.blake2b(f"{seed}\x1f{purpose}\x1f{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_of(text: str, params: PrepareParams, seed: int) -> Split:
    """The split of a text, by the shares in params."""
    value = hash_uniform(text, seed, "split")
    if value < params.test_share:
        return "test"
    return "validation" if value < params.test_share + params.validation_share else "train"


def rater_half(text: str, params: PrepareParams, seed: int) -> Half:
    """The half of a rated text: the pipeline's (proxy), or the gold judge's alone (gold)."""
    return "gold" if hash_uniform(text, seed, "half") < params.gold_share else "proxy"


def in_stable_order(items: Iterable[tuple[str, TextT]], seed: int) -> list[TextT]:
    """The items of (text, item) pairs in a pseudo-random order that additions do not disturb."""
    return [item for _, item in sorted(items, key=lambda pair: (hash_uniform(pair[0], seed, "order"), pair[0]))]
