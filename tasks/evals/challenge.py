"""Pairs made by rule from held-out sentences, that test judges; the idea is RewardBench's (arXiv 2403.13787)."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from statistics import fmean
from typing import NamedTuple

from torch import Tensor

from tasks.core.rows import Preference, Rating, read_rows, write_table
from tasks.evals.statistics import TIE_TOLERANCE, wilson_interval

__all__ = ["CATEGORIES", "ChallengePair", "challenge_pairs", "challenge_samples", "load_challenge", "write_challenge"]

MIN_TEXTS, MAX_TEXTS = 20, 100
"""Fewer sentences give no pair; of more, the best rated are used."""

MIN_WORDS, MAX_WORDS = 8, 60

VERB = re.compile(r"\b(is|are|was|were|(?:it|he|she|that)'s)\b", re.IGNORECASE)
NEGATION = re.compile(r"n't\b|\b(not|no|never|none|nothing|nobody|neither|nor|without|hardly|cannot)\b", re.IGNORECASE)
FILLERS = (
    "This sentence was typed on a keyboard and then it was stored in a file on a computer.",
    "These words were written down by one person and then read by another person on another day.",
    "There are letters in this line, and there are spaces between the words of this line.",
)
PRAISE = ("great", "wonderful", "brilliant", "beautiful", "excellent", "funny", "moving", "superb", "perfect", "best")


class ChallengePair(NamedTuple):
    """Two responses to a prompt (empty where the text is whole), of which one is right."""

    category: str
    prompt: str
    right: str
    wrong: str


def _negate(text: str, _: Random) -> str | None:
    return VERB.sub(r"\1 not", text, count=1) if VERB.search(text) and not NEGATION.search(text) else None


def _scramble(text: str, rng: Random) -> str | None:
    words = text.split()
    shuffled = rng.sample(words, len(words))
    return " ".join(shuffled) if shuffled != words else None


def _repeat(text: str, _: Random) -> str:
    return " ".join([text, *text.split()[-3:] * 2])


CATEGORIES: Mapping[str, Callable[[str, Random], str | None]] = {
    "negation": _negate,
    "praise": lambda text, rng: " ".join(rng.choices(PRAISE, k=len(text.split()))),
    "scrambled": _scramble,
    "repetition": _repeat,
    "truncated": lambda text, _: " ".join(text.split()[: len(text.split()) // 2]),
    "length": lambda text, rng: f"{text} {rng.choice(FILLERS)}",
}
"""Category → what makes the wrong side of the sentence, or None where it does not fit.

The right side is always the sentence. `negation`: "not" after its first form of "to be", of sentences without negation.
`praise`: words of praise, as many as it has. `scrambled`: its words in random order. `repetition`: its last three words
twice more. `truncated`: the first half of its words. `length`: a neutral sentence behind it, which says nothing of the
subject; here a tie is right, too, for only a preference for the longer is wrong.
"""

NEEDS_RATINGS = ("negation", "praise")  # they are about liking: the sentence must be known to like its subject


def challenge_pairs(texts: Sequence[tuple[str, str]], seed: int, ratings: Sequence[float] = ()) -> list[ChallengePair]:
    """Make the pairs of each category from (prompt, response) of one line with 8 to 60 words each.

    Where people rated the texts, of the best rated third, at most 100: a judge of ratings may well put a spoiled
    complaint above a complaint. Without ratings, all are what people preferred, and the categories are those of form.
    """
    plain = [
        (ratings[index] if ratings else 0.0, text)
        for index, text in enumerate(texts)
        if "\n" not in "".join(text) and MIN_WORDS <= len(text[1].split()) <= MAX_WORDS
    ]
    if len(plain) < MIN_TEXTS:
        return []
    best = sorted(plain, key=lambda item: -item[0])[: len(plain) // 3 if ratings else None]
    pairs = []
    for category, spoil in CATEGORIES.items():
        if ratings or category not in NEEDS_RATINGS:
            for _, (prompt, text) in best[:MAX_TEXTS]:
                spoiled = spoil(text.strip(), Random(f"{seed}/{category}/{prompt}{text}"))
                if spoiled is not None:
                    space = text[: len(text) - len(text.lstrip())]
                    pairs.append(ChallengePair(category, prompt, text, space + spoiled))
    return pairs


def load_challenge(ratings: Path, pairs: Path, seed: int) -> list[ChallengePair]:
    """Make pairs from a file of rated texts, or where that is missing or empty, from the chosen sides of one of pairs.

    Both are of the test split, on which nothing is trained.
    """
    filled = [path for path in (ratings, pairs) if path.is_file() and path.stat().st_size]
    if ratings in filled:
        rated = read_rows(ratings, Rating)
        return challenge_pairs([("", row.text) for row in rated], seed, [row.mean for row in rated])
    rows = read_rows(pairs, Preference) if pairs in filled else []
    return challenge_pairs(list(dict.fromkeys((row.prompt, row.chosen) for row in rows)), seed)


def challenge_samples(pairs: Sequence[ChallengePair]) -> list[tuple[str, str]]:
    """The right sides, then the wrong ones, as a scorer reads them."""
    return [(pair.prompt, pair.right) for pair in pairs] + [(pair.prompt, pair.wrong) for pair in pairs]


def write_challenge(path: Path, pairs: Sequence[ChallengePair], scores: Tensor) -> dict[str, float]:
    """Write a row per category: pairs, accuracy, and its Wilson interval; return the accuracies, and their mean.

    Args:
        scores: [2 · pairs], of `challenge_samples`. Both are empty where there are no pairs.
    """
    gaps = (scores[: len(pairs)] - scores[len(pairs) :]).tolist()
    rows: list[dict[str, object]] = []
    accuracies: dict[str, float] = {}
    for category in dict.fromkeys(pair.category for pair in pairs):
        least = -TIE_TOLERANCE if category == "length" else TIE_TOLERANCE
        right = [gap > least for pair, gap in zip(pairs, gaps, strict=True) if pair.category == category]
        share = wilson_interval(fmean(right), len(right))
        accuracies[category] = share.mean
        interval = {"accuracy": share.mean, "low": share.low, "high": share.high}
        rows.append({"category": category, "pairs": len(right)} | {key: round(x, 6) for key, x in interval.items()})
    write_table(path, rows, ("category", "pairs", "accuracy", "low", "high"))
    each = {f"challenge/{category}": accuracy for category, accuracy in accuracies.items()}
    return {"challenge_accuracy": fmean(accuracies.values()), **each} if accuracies else {}
