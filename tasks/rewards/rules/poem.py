"""Reward for a short rhymed poem, such as a limerick: its form, and guards against gaming the form.

    value = (lines + rhyme + metre) / 3 · distinct · sane · dictionary · on topic, each part in [0, 1]

Half the form earns half; a poem that fails one of the factors wholly earns nothing.

Gamed by, and what stands against that:
- five copies of one line, which rhyme and scan: `distinct`, and no word rhymes with itself or its like (see, sea);
- one rhyme for all lines: a letter's first line must not sound like that of any earlier letter, equal or not;
- made-up words at the ends: only words of CMUdict rhyme, and `dictionary`;
- single words as lines, or everything in one line: `sane`;
- one poem for every prompt: `on topic`, and the detector `ngram_collapse`;
- good form without sense: nothing here reads sense. The KL penalty to a model of demonstrations does, and people.
"""

from __future__ import annotations

import math
import re
from functools import cache
from itertools import combinations, product
from typing import TYPE_CHECKING, Any

from tasks.core.text_stats import tokenize_words
from tasks.rewards.rules.base import Answers, PerSampleRule, import_extra
from tasks.rewards.rules.style import count_syllables

if TYPE_CHECKING:
    from tasks.config.rules import PoemRule

__all__ = ["lines_of", "poem_rule", "poem_scores", "rhyme_score", "words_rhyme"]

STOP_WORDS = frozenset({
    "a", "about", "all", "an", "and", "are", "as", "at", "be", "but", "by", "for", "from", "has", "have", "he",
    "her", "his", "i", "in", "into", "is", "it", "its", "limerick", "limericks", "me", "my", "no", "not", "of",
    "on", "one", "or", "our", "poem", "poems", "rhyme", "she", "so", "some", "than", "that", "the", "their", "them",
    "there", "they", "this", "to", "up", "us", "verse", "was", "we", "were", "what", "when", "who", "will", "with",
    "write", "you", "your",
})  # fmt: skip
"""Words that name no topic: function words, and those that ask for a poem."""


def poem_rule(options: PoemRule, _answers: Answers) -> PerSampleRule:
    """The product above; pronunciations are CMUdict's, by `pronouncing` and `cmudict`, which is under the GPL."""
    import_extra("pronouncing", "poem", extra="poem")

    def score(prompt: str, response: str) -> float:
        lines, rhyme, metre, *guards = poem_scores(prompt, response, options).values()
        return math.prod(guards, start=(lines + rhyme + metre) / 3)

    return PerSampleRule(score)


def poem_scores(prompt: str, response: str, options: PoemRule) -> dict[str, float]:
    """Scores of the parts.

    - lines: closeness of their number to the scheme's: 1 − |n − N| / N.
    - rhyme: share of the scheme's pairs that rhyme; those of a letter only where it sounds like no earlier one.
    - metre: share of the scheme's lines that are there with a number of syllables within their letter's bounds.
    - distinct: (different lines − 1) / (lines − 1): five copies have 0.
    - sane: share of lines whose number of words is within `line_words`.
    - dictionary, topic: share of words that CMUdict knows, and of the topic's words that the response names.
    """
    lines = lines_of(response)
    if not lines:
        return dict.fromkeys(("lines", "rhyme", "metre", "distinct", "sane", "dictionary", "topic"), 0.0)
    least, most = options.line_words
    poem_words = [word for line in lines for word in line]
    return {
        "lines": max(0.0, 1 - abs(len(lines) - len(options.scheme)) / len(options.scheme)),
        "rhyme": rhyme_score([line[-1] for line in lines], options.scheme),
        "metre": _metre_score(lines, options),
        "distinct": (len(set(lines)) - 1) / (len(lines) - 1) if len(lines) > 1 else 1.0,
        "sane": sum(least <= len(line) <= most for line in lines) / len(lines),
        "dictionary": sum(bool(_pronunciations(word)) for word in poem_words) / len(poem_words),
        "topic": _topic_score(prompt, poem_words, options.topic),
    }


def lines_of(response: str) -> list[tuple[str, ...]]:
    """The words of each line that has any."""
    return [tuple(found) for line in response.splitlines() if (found := tokenize_words(line.replace("’", "'")))]


def rhyme_score(ends: list[str], scheme: str) -> float:
    """Share of the scheme's pairs whose last words rhyme; AABBA has four."""
    letters = list(zip(scheme, ends, strict=False))
    pairs = sum(one == other for one, other in combinations(scheme, 2))
    sounds: dict[str, set[tuple[str, ...]]] = {}
    for letter, end in letters:
        sounds.setdefault(letter, {tuple(rhyme) for _, rhyme in _endings(end)})
    reused_rhymes = {later for earlier, later in combinations(sounds, 2) if sounds[earlier] & sounds[later]}
    rhyming = sum(
        words_rhyme(one, other) and letter not in reused_rhymes
        for (letter, one), (same, other) in combinations(letters, 2)
        if letter == same
    )
    return rhyming / pairs if pairs else 1.0


def words_rhyme(one: str, other: str) -> bool:
    """Whether words sound alike from the last stressed vowel on, and not before it: `leave` and `believe` do not.

    A sound without a vowel (hmm) rhymes with nothing.
    """
    return any(here[1] == there[1] and here[0] != there[0] for here, there in product(_endings(one), _endings(other)))


def _metre_score(lines: list[tuple[str, ...]], options: PoemRule) -> float:
    bounds = [options.syllables.get(letter) for letter in options.scheme]
    fits = [
        bound is None or bound[0] <= sum(map(_count_syllables, line)) <= bound[1]
        for line, bound in zip(lines, bounds, strict=False)
    ]
    return sum(fits) / len(options.scheme)


def _topic_score(prompt: str, poem_words: list[str], pattern: str | None) -> float:
    """Fraction of the topic's content words that the poem contains; plain plurals count as their singulars."""
    found = re.search(pattern, prompt) if pattern else None
    topic = set(tokenize_words(found[1] if found else prompt)) - STOP_WORDS
    poem_stems = {_stem(word) for word in poem_words}
    return sum(_stem(word) in poem_stems for word in topic) / len(topic) if topic else 1.0


def _stem(word: str) -> str:
    bare = word.removesuffix("'s")
    return bare.removesuffix("s") if len(bare) > 3 and not bare.endswith("ss") else bare


@cache
def _pronunciations(word: str) -> tuple[str, ...]:
    """Its pronunciations, secondary stress written as primary; none if CMUdict lacks it."""
    pronouncing: Any = import_extra("pronouncing", "poem", extra="poem")
    return tuple(phones.replace("2", "1") for phones in pronouncing.phones_for_word(word))


def _count_syllables(word: str) -> int:
    pronunciations = _pronunciations(word)
    return sum(map(str.isdigit, pronunciations[0])) if pronunciations else count_syllables(word)


def _endings(word: str) -> list[tuple[list[str], list[str]]]:
    """`_ending` of each pronunciation that has a vowel: a phone with a digit."""
    return [_ending(phones.split()) for phones in _pronunciations(word) if any(map(str.isdigit, phones))]


def _ending(phones: list[str]) -> tuple[list[str], list[str]]:
    """The consonants right before the last stressed vowel, and all from that vowel on."""
    vowels = [index for index, phone in enumerate(phones) if phone[-1].isdigit()]
    start = max((index for index in vowels if phones[index].endswith("1")), default=vowels[0])
    before = max((index + 1 for index in vowels if index < start), default=0)
    return phones[before:start], phones[start:]
