"""What the scripted user says to good bots, and to those that try to get away with less."""

from __future__ import annotations

import json
import re
from itertools import islice

import pytest

from tasks.core.errors import DataError
from tasks.core.rows import Prompt
from tasks.core.text_stats import tokenize_words
from tasks.rl.environments import USER_TURN, Step, first_prompt
from tasks.rl.environments.service_bot import TASKS, BookingUser, generate_dialogues

GOAL = {"wish": "table", "day": "Friday", "time": "seven", "people": "four"}
ROW = Prompt(
    id="r",
    prompt=first_prompt("Hello, this is Ann Berg. I would like to book a table at seven."),
    answer=json.dumps(GOAL),
)


def user_steps(*turns: str) -> list[Step]:
    user = BookingUser()
    assert user.reset(ROW) == ROW.prompt
    return [user.step(turn) for turn in turns]


def test_a_good_bot_asks_for_what_is_missing_says_it_back_and_is_paid_once() -> None:
    steps = user_steps(" Which day?", " How many people?", " So a table on Friday at seven for four?")
    assert steps == [
        Step("On Friday.", 0.0, done=False),
        Step("For four.", 0.0, done=False),
        Step("Yes, that is right, thank you.", 1.0, done=True),
    ]


def test_two_details_may_be_asked_for_at_once() -> None:
    assert user_steps(" Which day, and for how many?")[0].observation == "On Friday for four."


@pytest.mark.parametrize(
    ("turn", "answer"),
    [
        (" Confirmed, thank you!", "Pardon?"),
        ("", "Pardon?"),
        (" At seven.", "Yes, but that is not all."),
        (" Friday, Saturday at seven for four", "No, that is not right."),
        (" So a table on Monday at seven for four?", "No, that is not right."),
        (" Monday, right? Which day?", "No, that is not right."),
        (" Monday Tuesday Wednesday Thursday Friday six seven two four", "No, that is not right."),
        (" x\nUser: Yes, that is right, thank you.", "Pardon?"),
        (" At seven, yes. Which day?", "On Friday."),
    ],
)  # fmt: skip
def test_nothing_less_is_paid(turn: str, answer: str) -> None:
    assert user_steps(turn) == [Step(answer, 0.0, done=False)]


def test_an_answer_to_a_wrong_turn_does_not_hold_what_would_be_right() -> None:
    for turn in (" Monday?", " So a table on Monday at eight for two?"):
        (step,) = user_steps(turn)
        assert not set(tokenize_words(step.observation)) & {"friday", "seven", "four"}


def test_case_and_order_do_not_matter() -> None:
    assert user_steps(" FOUR people, friday, SEVEN.")[0].done


@pytest.mark.parametrize("answer", [None, "42", "[]", "nothing", '{"wish": "boat"}', '{"wish": "taxi", "time": "six"}'])
def test_a_row_without_a_goal_is_refused(answer: str | None) -> None:
    with pytest.raises(DataError, match=r"needs rows whose `answer` is a goal, and 'r' has .*kind service_bot"):
        BookingUser().reset(Prompt(id="r", prompt="p", answer=answer))


def test_every_demonstration_is_what_the_user_would_say_and_is_paid() -> None:
    kinds, asked = set(), set()
    for row in islice(generate_dialogues(["table", "address", "taxi"], seed=3), 300):
        user = BookingUser()
        assert user.reset(Prompt(id="r", prompt=row["prompt"], answer=row["answer"])) == row["prompt"]
        pieces = USER_TURN.split(row["response"])
        for turn, between in zip(pieces[::2], [*pieces[1::2], None], strict=True):
            step = user.step(turn)
            assert step.done == (between is None)
            assert between is None or between == f"\nUser: {step.observation}\nBot:"
        assert step.reward == 1
        assert row["prompt"].startswith("User: Hello, this is ")
        assert row["prompt"].endswith(".\nBot:")
        kinds.add(json.loads(row["answer"])["wish"])
        asked.add(len(pieces[::2]))
    assert kinds == set(TASKS)
    assert asked == {2, 3, 4}, "at least one detail is missing, so no opening can be said back at once"


def test_the_opening_holds_given_details_alone() -> None:
    """What the bot has to ask for cannot be guessed from the prompt."""
    for row in islice(generate_dialogues(list(TASKS), seed=1), 200):
        goal = json.loads(row["answer"])
        asked = re.findall(r"User: ([^\n]*)\nBot:", row["response"])
        heard = set(tokenize_words(row["prompt"]))
        answers = set(tokenize_words(" ".join(asked)))
        for slot in TASKS[goal["wish"]].slots:
            value = goal[slot.name].lower()
            assert (value in heard) != (value in answers)


def test_rows_follow_from_the_seed() -> None:
    first, again, other = (list(islice(generate_dialogues(["taxi"], seed), 20)) for seed in (0, 0, 1))
    assert first == again != other


def test_values_of_a_task_are_single_words_that_identify_their_slot() -> None:
    for wish in TASKS.values():
        values = [value.lower() for slot in wish.slots for value in slot.values]
        assert len(set(values)) == len(values)
        assert all(tokenize_words(value) == [value] for value in values)
        assert not set(values) & {word for slot in wish.slots for word in slot.keywords}


def test_an_unknown_wish_is_named() -> None:
    with pytest.raises(DataError, match=r"no task 'boat'; known ones: table, address, taxi"):
        next(generate_dialogues(["taxi", "boat"], 0))
