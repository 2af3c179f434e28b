"""Slot-filling dialogues with a scripted user: the policy asks for missing details and confirms all of them.

The user opens with a name, the task and some of its details. The bot asks for those that are missing, the user answers,
and once the bot has named every detail rightly in one turn, the user confirms: that is the reward (as in LMRL-Gym,
Abdulhai et al. 2023, arXiv 2311.18232). The user reads words, no grammar.

Gamed by:
- saying "confirmed" or "thank you": the user confirms only what the bot has named, detail by detail;
- repeating the user: no single answer holds all details, so repeating one is not enough. Repeating all that the user
  wrote is right in content; only the KL penalty acts against its bad English;
- listing every value of a slot: two different values of one slot count as wrong;
- guessing in order to be corrected: the user says that it is wrong, not what is wrong, nor what would be right;
- writing the user's lines itself: the user reads the bot's turn alone, and what stands in it is not believed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from tasks.core.errors import DataError
from tasks.core.rows import Prompt
from tasks.core.text_stats import tokenize_words
from tasks.rl.environments import Step, first_prompt, user_turn

if TYPE_CHECKING:
    from tasks.config.data import SourceParams

__all__ = ["TASKS", "BookingUser", "generate_dialogues", "read_service_bot"]

Goal = Mapping[str, str]
"""Slot → the value that the user wants; `wish` names the task."""


@dataclass(frozen=True)
class Slot:
    """One detail of a task."""

    name: str  # in the goal
    question: str  # how a good bot asks for it
    keywords: frozenset[str]  # any of these words in the bot's turn asks for it
    phrase: str  # template of a value for user and bot
    values: tuple[str, ...]  # one word each, and different from those of the task's other slots


@dataclass(frozen=True)
class Task:
    """A task of the user: the user's opening, the bot's confirmation, and the slots to fill."""

    opening: str
    confirmation: str
    slots: tuple[Slot, ...]


DEFAULT_DIALOGUES = 1000  # generated without end

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
HOURS = ("six", "seven", "eight", "nine")
PEOPLE = ("two", "three", "four", "five")
STREETS = ("Oak", "Elm", "Mill", "Park", "High")
TOWNS = ("Leeds", "Bath", "York", "Derby", "Ely")

TIME = Slot("time", "What time?", frozenset({"time"}), "at {}", HOURS)

TASKS: Mapping[str, Task] = {
    "table": Task(
        "I would like to book a table", "So a table",
        (
            Slot("day", "Which day?", frozenset({"day"}), "on {}", DAYS),
            TIME,
            Slot("people", "How many people?", frozenset({"many", "people"}), "for {}", PEOPLE),
        ),
    ),
    "address": Task(
        "I have moved", "So you moved",
        (
            Slot("street", "Which street?", frozenset({"street"}), "to {} Street", STREETS),
            Slot("town", "Which town?", frozenset({"town", "city"}), "in {}", TOWNS),
        ),
    ),
    "taxi": Task(
        "I need a taxi", "So a taxi",
        (
            Slot("place", "Where to?", frozenset({"where"}), "to the {}", ("airport", "hotel", "museum", "harbour")),
            TIME,
        ),
    ),
}  # fmt: skip

FIRST_NAMES = (
    "Ann", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jack", "Kim", "Leo", "Mia", "Ned", "Olga",
    "Rita", "Sam", "Tina", "Uwe", "Vera", "Will", "Yara", "Zoe", "Adam", "Bella", "Carl", "Dora", "Emil", "Fay",
)  # fmt: skip
LAST_NAMES = (
    "Adams", "Berg", "Clark", "Dean", "Evans", "Fox", "Grant", "Hill", "Irving", "Jones", "King", "Lane", "Moss",
    "Owen", "Pike", "Quinn", "Reed", "Shaw", "Todd", "Usher", "Vance", "Ward", "Young", "Abbot", "Brook", "Cole",
)  # fmt: skip


class BookingUser:
    """The scripted user of one row, whose `answer` is the goal as JSON."""

    def __init__(self) -> None:
        self._goal: Goal = {}

    def reset(self, row: Prompt) -> str:
        """The row's prompt; DataError where the row's answer is no goal."""
        self._goal = _parse_goal(row)
        return row.prompt

    def step(self, action: str) -> Step:
        """Answer a turn of the bot."""
        slots = TASKS[self._goal["wish"]].slots
        bot_words = set(tokenize_words(action))
        named_values = {slot.name: {value for value in slot.values if value.lower() in bot_words} for slot in slots}
        correct = [named_values[slot.name] == {self._goal[slot.name]} for slot in slots]
        asked_slots = [slot for slot in slots if slot.keywords & bot_words]
        if all(correct):
            return Step("Yes, that is right, thank you.", 1.0, done=True)
        if any(named_values[slot.name] and not is_correct for slot, is_correct in zip(slots, correct, strict=True)):
            return Step("No, that is not right.", 0.0, done=False)
        if asked_slots:
            return Step(_sentence(_phrases(asked_slots, self._goal)), 0.0, done=False)
        return Step("Yes, but that is not all." if any(correct) else "Pardon?", 0.0, done=False)


def generate_dialogues(task_names: Sequence[str], seed: int) -> Iterator[dict[str, str]]:
    """Generate rows without end: a prompt, the goal as `answer`, and the scripted dialogue as `response`."""
    if unknown := [name for name in task_names if name not in TASKS]:
        raise DataError(f"the service bot knows no task {unknown[0]!r}; known ones: {', '.join(TASKS)}")
    rng = random.Random(seed)
    while True:
        name = rng.choice(task_names)
        task = TASKS[name]
        goal = {"wish": name} | {slot.name: rng.choice(slot.values) for slot in task.slots}
        known = rng.sample(task.slots, rng.randrange(len(task.slots)))
        given_slots = [slot for slot in task.slots if slot in known]
        greeting = f"Hello, this is {rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}."
        yield {
            "prompt": first_prompt(f"{greeting} {_sentence([task.opening, *_phrases(given_slots, goal)])}"),
            "answer": json.dumps(goal),
            "response": _scripted_bot(task, goal, [slot for slot in task.slots if slot not in known]),
        }


def _scripted_bot(task: Task, goal: Goal, missing: Sequence[Slot]) -> str:
    """Ask for each missing detail, one a turn, then confirm all of them."""
    questions = [f" {slot.question}{user_turn(_sentence(_phrases([slot], goal)))}" for slot in missing]
    return "".join([*questions, f" {' '.join([task.confirmation, *_phrases(task.slots, goal)])}?"])


def _phrases(slots: Sequence[Slot], goal: Goal) -> list[str]:
    return [slot.phrase.format(goal[slot.name]) for slot in slots]


def _sentence(phrases: Sequence[str]) -> str:
    text = " ".join(phrases)
    return f"{text[0].upper()}{text[1:]}."


def _parse_goal(row: Prompt) -> Goal:
    try:
        goal = json.loads(row.answer or "")
        valid = set(goal) == {"wish", *(slot.name for slot in TASKS[goal["wish"]].slots)}
    except (json.JSONDecodeError, TypeError, KeyError):
        valid = False
    if not valid:
        raise DataError(
            f"the environment service_bot needs rows whose `answer` is a goal, and {row.id!r} has {row.answer!r}: use "
            "a source of kind service_bot"
        )
    return dict(goal)


def read_service_bot(source: SourceParams, seed: int) -> tuple[Iterable[tuple[str, int, object]], dict[str, object]]:
    """Generate `limit` dialogues from the seed: the user's opening, the dialogue, and the goal as answer.

    Raises:
        DataError: there is no such task.
    """
    tasks = source.id.split(",")
    rows = list(islice(generate_dialogues(tasks, seed), source.limit or DEFAULT_DIALOGUES))
    origin: dict[str, object] = {"source": "scripted dialogues of this project", "wishes": tasks, "seed": seed}
    return ((f"service_bot/{source.id}", line, row) for line, row in enumerate(rows, start=1)), origin
