"""Questions and labels: their fields, limits and ids, and pseudonyms of labellers."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

__all__ = [
    "ARGILLA_PREFIX", "CHOICES", "FLIPPED", "LABEL_STUDIO_PREFIX", "MAX_COMMENT_LENGTH", "MAX_LENGTHS",
    "MAX_NAME_LENGTH", "MODEL_PREFIX", "VALUED_CHOICES", "Label", "Question", "flip", "hide_names", "is_model",
    "label_error", "pseudonym", "question_error", "question_id", "show_swapped", "text_error",
]  # fmt: skip

CHOICES = ("a", "b", "tie", "both_bad", "skip")
"""The first response is better, the second is, both are equally good, both are bad, no opinion."""

VALUED_CHOICES = CHOICES[:-1]
"""Choices that can be right or wrong; a skip is a missing value."""

FLIPPED = {"a": "b", "b": "a"}
"""Choices that prefer one response, and may have a strength, and what they are when the responses change places."""

MAX_NAME_LENGTH = 64
MAX_COMMENT_LENGTH = 5000
MAX_LENGTHS = {"policy_a": 64, "policy_b": 64, "reason": 32}
"""Characters at most, of a question's short texts."""

NUL = "holds a NUL character, which PostgreSQL cannot keep"

MODEL_PREFIX = "model:"
PERSON_PREFIX, ARGILLA_PREFIX, LABEL_STUDIO_PREFIX = "person-", "argilla:", "label-studio:"
"""Name prefixes: of models, and of people known by a pseudonym, by Argilla's id or by Label Studio's number alone."""

ANONYMOUS = re.compile(
    rf"{MODEL_PREFIX}.*|{PERSON_PREFIX}[0-9a-f]{{12}}|{ARGILLA_PREFIX}[0-9a-f-]{{36}}|{LABEL_STUDIO_PREFIX}\d+",
    re.DOTALL,
)
"""Labellers whose name says nothing about a person."""

SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Question:
    """Two responses to one prompt, to be compared; a and b are the stored order, not the one that a labeller sees.

    Attributes:
        policy_a, policy_b: which policy wrote each response: sft, ppo, ….
        reason: why it is asked: random, disagreement, gold, imported.
        gold: the right choice, where the question tests labellers.
        priority: questions of higher priority are shown first.
        labels_wanted: by how many people; gold questions go to all of them.
    """

    id: str
    prompt: str
    response_a: str
    response_b: str
    policy_a: str
    policy_b: str
    reason: str
    gold: str | None = None
    priority: float = 0.0
    labels_wanted: int = 1


@dataclass(frozen=True)
class Label:
    """One labeller's comparison of a question's two responses, in the stored order.

    Attributes:
        choice: one of CHOICES.
        strength: how much better: 1 slightly, 2 clearly, 3 far; for a and b only.
        rating_a, rating_b: direct ratings, 1 to 5.
        swapped: whether response_b was shown first.
        seconds: from the question's display to the click.
        guidelines: sha256 of the guidelines shown beside the question; see `tasks.labelling.guidelines`.
        event_id: its number in the database; 0 until it is stored.
    """

    question_id: str
    labeller: str
    choice: str
    strength: int | None = None
    rating_a: int | None = None
    rating_b: int | None = None
    comment: str | None = None
    swapped: bool = False
    seconds: float | None = None
    guidelines: str | None = None
    event_id: int = field(default=0, compare=False)


def question_id(prompt: str, response_a: str, response_b: str) -> str:
    """Return the same id for the same texts, in whichever order the two responses come."""
    content = "\x1f".join([prompt, *sorted((response_a, response_b))])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def show_swapped(question_id: str, labeller: str) -> bool:
    """Return whether this labeller sees response_b first: even chances, and always the same for the same two."""
    return bool(hashlib.sha256(f"{question_id}\0{labeller}".encode()).digest()[0] % 2)


def flip(label: Label) -> Label:
    """Return the same label for the two responses in the other order."""
    choice = FLIPPED.get(label.choice, label.choice)
    return replace(label, choice=choice, rating_a=label.rating_b, rating_b=label.rating_a, swapped=not label.swapped)


def label_error(label: Label) -> str | None:
    """Return why the label cannot be kept, or None where it can."""
    if label.choice not in CHOICES:
        return f"choice: {label.choice!r} is none of {', '.join(CHOICES)}"
    if label.strength is not None and not (label.choice in FLIPPED and label.strength in (1, 2, 3)):
        return f"strength: {label.strength} with {label.choice!r}; it is 1, 2 or 3, and for a and b only"
    ratings = (label.rating_a, label.rating_b)
    if any(rating is not None and rating not in range(1, 6) for rating in ratings):
        return f"rating: {ratings} should be from 1 to 5"
    if not 0 < len(label.labeller) <= MAX_NAME_LENGTH or text_error("labeller", label.labeller):
        return f"labeller: {label.labeller!r} should have 1 to {MAX_NAME_LENGTH} characters, none of them NUL"
    if label.guidelines is not None and not SHA256.fullmatch(str(label.guidelines)):
        return f"guidelines: {label.guidelines!r} is no sha256 in 64 hexadecimal digits"
    comment = label.comment or ""
    if len(comment) > MAX_COMMENT_LENGTH:
        return f"comment: {len(comment)} characters, at most {MAX_COMMENT_LENGTH} are kept"
    return text_error("comment", comment)


def question_error(question: Question) -> str | None:
    """Return why the question cannot be kept, or None where it can."""
    for name in ("prompt", "response_a", "response_b", *MAX_LENGTHS):
        if reason := text_error(name, getattr(question, name)):
            return reason
    for name, most in MAX_LENGTHS.items():
        if (length := len(getattr(question, name))) > most:
            return f"{name}: {length} characters, at most {most} are kept"
    return None


def text_error(name: str, text: str) -> str | None:
    """Return why no database keeps the text, or None where one does."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"{name}: {error.reason} at character {error.start + 1}"
    return f"{name}: {NUL}" if "\0" in text else None


def is_model(labeller: str) -> bool:
    """Return whether the labeller is a model."""
    return labeller.startswith(MODEL_PREFIX)


def pseudonym(labeller: str) -> str:
    """Return a name that says which labels are of one person; knowing the person's name, one can recompute it.

    Anonymous names are kept, so that labels that come back still belong to the same labeller.
    """
    if ANONYMOUS.fullmatch(labeller):
        return labeller
    return f"{PERSON_PREFIX}{hashlib.sha256(f'labeller {labeller}'.encode()).hexdigest()[:12]}"


def hide_names(labels: Iterable[Label]) -> list[Label]:
    """Return the labels under pseudonyms."""
    return [replace(label, labeller=pseudonym(label.labeller)) for label in labels]
