"""Rewards for style: length, repetition, language, sentiment, readability."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from tasks.core.errors import ConfigError
from tasks.core.text_stats import repetition_rate, tokenize_words
from tasks.rewards.rules.base import Answers, PerSampleRule, import_extra

if TYPE_CHECKING:
    from tasks.config.rules import LanguageRule, VaderRule

__all__ = [
    "VADER_CHARACTERS", "count_sentences", "count_syllables", "language_rule", "length", "readability", "repetition",
    "vader_rule",
]  # fmt: skip

SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]+[\"'”’)\]]*(?=\s|$)")
VOWELS = re.compile(r"[aeiouyäöüàáâèéêìíîòóôùúû]+")
VADER_CHARACTERS = 1000  # its time grows with the square of the words: a megabyte would take hours
SILENT_E = re.compile(r"(?<=[bcdfghjklmnpqrstvwxz])(?<![bcdfgkpstz]l)(?:e|(?<![td])ed|(?<![szxcg])(?<![cs]h)es)$")
"""As in `like`, `jumped` and `makes`, not in `little`, `wanted`, `handled` or `wishes`."""


def length(response: str, *, target: int, tolerance: int) -> float:
    """1 at `target` words, falling linearly to 0 at `tolerance` words away from it, and 0 beyond; in [0, 1].

    Gamed by: padding with empty words up to the target, or stopping there in the middle of a sentence.
    Against that: a repetition weight, the KL penalty, and a tolerance so wide that one word more or less changes
    little. Watch the share without an end token beside it.
    """
    return max(0.0, 1 - abs(len(tokenize_words(response)) - target) / tolerance)


def repetition(response: str) -> float:
    """Minus the share of word pairs that already occurred in the response, in (−1, 0].

    Why pairs: `REPETITION_NGRAM`. A response of up to two words gets 0.

    Gamed by: very short responses, signs instead of words, and paraphrases of the same thing, which no n-gram
    sees. Against that: a length weight, the learned component (people dislike a sentence that goes nowhere) and the
    KL penalty. Varying punctuation or letter case does not help.
    """
    return 0.0 - repetition_rate(response)  # not −share: no −0.0 in the files


def count_sentences(text: str) -> int:
    """Count sentences: end marks before white space or the end, and a last piece without one."""
    return sum(bool(tokenize_words(piece)) for piece in SENTENCE_END.split(text))


def count_syllables(word: str) -> int:
    """Count syllables: vowel groups without a silent e, at least one; right for 89 % of CMUdict's English words."""
    word = word.lower()
    return max(1, len(VOWELS.findall(word)) - bool(SILENT_E.search(word)))


def reading_ease(text: str) -> float:
    """206.835 − 1.015 · words per sentence − 84.6 · syllables per word (Flesch 1948, J. Appl. Psychology 32, 221)."""
    words = tokenize_words(text)
    syllables = sum(map(count_syllables, words))
    return 206.835 - 1.015 * (len(words) / count_sentences(text)) - 84.6 * (syllables / len(words))


def readability(response: str, *, low: float, high: float, tolerance: float, min_words: int) -> float:
    """1 where Flesch's reading ease lies in the band, falling linearly to 0 `tolerance` points outside it; in [0, 1].

    Gamed by: short sentences of short words, whatever they say; digits and scripts that are not Latin, whose every word
    counts as one syllable. Against that: the upper end of the band, for "I am. I go." lies far above it, `min_words`, a
    repetition weight, a `language` gate and a learned component.
    """
    if len(tokenize_words(response)) < min_words:
        return 0.0
    ease = reading_ease(response)
    return max(0.0, 1 - max(low - ease, ease - high, 0.0) / tolerance)


def vader_rule(options: VaderRule, _answers: Answers) -> PerSampleRule:
    """VADER's compound score of the response (Hutto & Gilbert 2014, ICWSM), in [−1, 1]; negated for negative sentiment.

    It reads the first `VADER_CHARACTERS`. `form: sum` adds up the valences of the words in its lexicon.

    Gamed by: praise that says nothing ("great great great"), which saturates the score; the sum pays every further word
    of it. Against that: a repetition weight, a length weight and the KL penalty. VADER is then no independent judge:
    `evaluate.vader` must be false.
    """
    vader: Any = SentimentIntensityAnalyzer()
    sign = 1.0 if options.sign == "positive" else -1.0

    def score(_prompt: str, response: str) -> float:
        text = response[:VADER_CHARACTERS]
        if options.form == "sum":
            return sign * sum(vader.lexicon.get(word, 0.0) for word in tokenize_words(text))
        return sign * float(vader.polarity_scores(text)["compound"])

    return PerSampleRule(score)


def language_rule(options: LanguageRule, _answers: Answers) -> PerSampleRule:
    """The probability that the response is in the language (py3langid: Lui & Baldwin 2012, ACL demos), in [0, 1].

    Gamed by: any words of the language in any order, and by one short phrase again and again. Against that:
    `min_words`, a repetition weight and the KL penalty. A response in two languages lies in between.

    Raises:
        ConfigError: the language is unknown, or py3langid is not installed.
    """
    identifier = _identifier(import_extra("py3langid.langid", "language"))
    if options.language not in identifier.labels:
        known = ", ".join(sorted(identifier.labels))
        raise ConfigError(f"the rule 'language' knows no language {options.language!r}; it knows {known}")

    def score(_prompt: str, response: str) -> float:
        if len(tokenize_words(response)) < options.min_words:
            return 0.0
        return float(dict(identifier.rank(response))[options.language])

    return PerSampleRule(score)


@cache
def _identifier(module: Any) -> Any:
    """py3langid's model, which takes a second to unpack."""
    return module.LanguageIdentifier.from_model_file(module.MODEL_FILE, norm_probs=True)
