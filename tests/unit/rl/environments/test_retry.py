"""A wrong answer may be tried again, and the reward is that of the answer."""

from __future__ import annotations

import pytest

from tasks.core.errors import DataError
from tasks.core.rows import Prompt
from tasks.rl.environments import Step
from tasks.rl.multi_turn import RetryEnvironment

ROW = Prompt(id="q", prompt="User: 15 - 43 =\nBot:", answer="-28")


def test_right_at_once_and_right_after_a_wrong_try_are_paid_alike() -> None:
    task = RetryEnvironment()
    assert task.reset(ROW) == ROW.prompt
    assert task.step(" -28") == Step("That is right.", 1.0, done=True)
    assert task.reset(ROW) == ROW.prompt
    assert task.step(" 28") == Step("That is not right. Try again.", 0.0, done=False)
    assert task.step(" -28.").reward == 1


def test_many_numbers_count_as_the_last_one() -> None:
    task = RetryEnvironment()
    task.reset(ROW)
    assert not task.step(" -28 or -27").done


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
