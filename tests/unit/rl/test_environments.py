"""How a dialogue is written down, and what environments say to good policies and to those that try to cheat."""

from __future__ import annotations

import json
import re
from itertools import islice

import pytest

from tasks.config.data import SourceParams
from tasks.core.errors import DataError
from tasks.core.rows import Demonstration, Prompt
from tasks.core.text_stats import tokenize_words
from tasks.data.sources import collect_source
from tasks.rl.environments import USER_TURN, Step, encode_dialogue, final_user_turn, first_prompt, user_turn
from tasks.rl.environments.service_bot import TASKS, BookingUser, generate_dialogues, read_service_bot
from tasks.rl.multi_turn import RetryEnvironment


class Signs:
    """A tokenizer whose tokens are signs; a text begins with token 2 unless it is said to be a piece."""

    eos_token_id, bos_token_id = 1, 2

    def __call__(self, text: str, add_special_tokens: bool = True, **options: bool) -> Signs:
        self.input_ids = [2] * add_special_tokens + [ord(sign) for sign in text]
        self.special_tokens_mask = [1] * add_special_tokens + [0] * len(text)
        return self


def test_roles_stand_on_lines_of_their_own() -> None:
    text = first_prompt("Hello.") + " Who?" + user_turn("Ann.") + " Ann?" + final_user_turn("Yes.")
    assert text == "User: Hello.\nBot: Who?\nUser: Ann.\nBot: Ann?\nUser: Yes."


def test_the_bots_turns_count_with_an_end_token_each_and_the_users_do_not() -> None:
    row = Demonstration(
        id="d", prompt=first_prompt("Hi."), response=" Who?\nUser: Ann.\nBot: Ann?\nUser: Yes.\nBot: Bye."
    )
    encoded, mask = encode_dialogue(row, Signs())
    ids, mask = encoded.prompt + encoded.responses[0], [0] * len(encoded.prompt) + mask
    written = "".join("<end>" if token == 1 else "" if token == 2 else chr(token) for token in ids)
    assert written == "User: Hi.\nBot: Who?<end>\nUser: Ann.\nBot: Ann?<end>\nUser: Yes.\nBot: Bye.<end>"
    own = "".join("|" if token == 1 else chr(token) for token, counts in zip(ids, mask, strict=True) if counts)
    assert own == " Who?| Ann?| Bye.|"
    assert ids.count(2) == 1, "only the prompt begins a text"


def test_a_response_without_a_user_is_one_turn() -> None:
    encoded, mask = encode_dialogue(Demonstration(id="d", prompt="ab", response=" 42"), Signs())
    assert encoded.prompt == [2, ord("a"), ord("b")]
    assert mask == [1, 1, 1, 1]


# -- a wrong answer may be tried again -----------------------------------------------------------------------------

QUESTION = Prompt(id="q", prompt="User: 15 - 43 =\nBot:", answer="-28")


def test_right_at_once_and_right_after_a_wrong_try_are_paid_alike() -> None:
    task = RetryEnvironment()
    assert task.reset(QUESTION) == QUESTION.prompt
    assert task.step(" -28") == Step("That is right.", 1.0, done=True)
    assert task.reset(QUESTION) == QUESTION.prompt
    assert task.step(" 28") == Step("That is not right. Try again.", 0.0, done=False)
    assert not task.step(" -28 or -27").done, "many numbers count as the last one"
    assert task.step(" -28.").reward == 1


def test_a_row_without_an_answer_is_refused() -> None:
    with pytest.raises(DataError, match=r"needs rows with an `answer`, and 'q' has none"):
        RetryEnvironment().reset(Prompt(id="q", prompt="p"))


def test_it_answers_tasks_of_reasoning_gym() -> None:
    gym = pytest.importorskip("reasoning_gym", reason="an extra of the project")
    task = RetryEnvironment()
    for item in gym.create_dataset("chain_sum", size=20, seed=0, min_terms=2, max_terms=2):
        task.reset(Prompt(id="q", prompt=item["question"], answer=str(item["answer"])))
        assert not task.step(f" {int(item['answer']) + 1}").done
        assert task.step(f" {item['answer']}").done


# -- the scripted user ---------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("confirmation", [" So a table on Friday at seven for four?", " FOUR people, friday, SEVEN."])
def test_a_good_bot_asks_for_what_is_missing_says_it_back_and_is_paid_once(confirmation: str) -> None:
    assert user_steps(" Which day?", " How many people?", confirmation) == [
        Step("On Friday.", 0.0, done=False),
        Step("For four.", 0.0, done=False),
        Step("Yes, that is right, thank you.", 1.0, done=True),
    ]


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
        (" Which day, and for how many?", "On Friday for four."),
    ],
)  # fmt: skip
def test_nothing_less_is_paid(turn: str, answer: str) -> None:
    assert user_steps(turn) == [Step(answer, 0.0, done=False)]


def test_an_answer_to_a_wrong_turn_does_not_hold_what_would_be_right() -> None:
    for turn in (" Monday?", " So a table on Monday at eight for two?"):
        (step,) = user_steps(turn)
        assert not set(tokenize_words(step.observation)) & {"friday", "seven", "four"}


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


def test_values_of_a_task_are_single_words_that_identify_their_slot() -> None:
    for wish in TASKS.values():
        values = [value.lower() for slot in wish.slots for value in slot.values]
        assert len(set(values)) == len(values)
        assert all(tokenize_words(value) == [value] for value in values)
        assert not set(values) & {word for slot in wish.slots for word in slot.keywords}


def test_an_unknown_wish_is_named() -> None:
    with pytest.raises(DataError, match=r"no task 'boat'; known ones: table, address, taxi"):
        next(generate_dialogues(["taxi", "boat"], 0))


def test_dialogues_are_demonstrations_with_the_goal_as_their_answer() -> None:
    source = SourceParams(name="talks", kind="service_bot", row_type="demonstrations", id="taxi,table", limit=30)
    readers = {"service_bot": read_service_bot}
    collected = collect_source(source, 7, readers)
    rows = [Demonstration.model_validate(item["row"]) for item in collected.rows]
    assert len(rows) == 30
    assert {json.loads(row.answer or "")["wish"] for row in rows} == {"taxi", "table"}
    origin = {"source": "scripted dialogues of this project", "wishes": ["taxi", "table"], "seed": 7}
    assert collected.origin == origin
    assert collect_source(source, 7, readers).rows == collected.rows
    assert collect_source(source, 8, readers).rows != collected.rows
