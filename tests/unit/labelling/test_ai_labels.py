"""Labels by a model behind a real server on this machine: both orders, cost, budget, pace, and going on when killed."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.config.evaluation import JudgeParams
from tasks.core.errors import ConfigError, DataError, SourceError
from tasks.evals.llm_judge import EndpointJudge, JudgeCache
from tasks.evals.pairwise import Cost
from tasks.labelling import ai_labels
from tasks.labelling.ai_labels import AutoLabelResult, Budget, Constitution, auto_label, combine_orders
from tasks.labelling.store import LabelStore
from tests.support.chat_server import TOKENS, Chat, longer, serving, shown
from tests.support.labels import memory_store, pair

ROOT = Path(__file__).resolve().parents[3]
ASKED = [pair(number) for number in range(4)]
KIND, BRIEF = Constitution("Be kind.", "kind"), Constitution("Be brief.", "brief")


@pytest.fixture
def chat() -> Iterator[Chat]:
    with serving(longer) as chat:
        yield chat


@pytest.fixture
def store() -> Iterator[LabelStore]:
    """Four questions to label."""
    with closing(memory_store(*ASKED)) as store:
        yield store


def run(
    store: LabelStore, chat: Chat, folder: Path, constitution: Constitution = KIND, model: str = "strong", **budget: Any
) -> tuple[AutoLabelResult, Cost]:
    params = JudgeParams(kind="endpoint", model=model, base_url=chat.url, prompts=1)
    judge = EndpointJudge(params, JudgeCache(folder / "answers.jsonl"))
    limits = Budget(**({"max_requests": 1000, "max_tokens": 10**6} | budget))
    return auto_label(store, judge, constitution, budget=limits), judge.cost


def test_both_orders_are_asked_and_the_label_is_of_the_model(store: LabelStore, chat: Chat, tmp_path: Path) -> None:
    done, cost = run(store, chat, tmp_path)
    assert done.choices == {"a": 4}
    assert (done.first, done.clear, done.left) == (4, 8, 0)
    assert (cost.requests, cost.tokens) == (8, 8 * TOKENS)
    asked = [shown(text) for text in chat.questions()]
    assert {texts[::-1] for texts in asked} == set(asked)
    assert all(text.startswith("Be kind.\n") for text in chat.questions())
    labels = store.current_labels()
    assert {(label.labeller, label.choice, label.comment) for label in labels} == {
        ("model:strong", "a", "constitution kind")
    }
    assert run(store, chat, tmp_path)[0].choices == {}, "everything was labelled"
    assert len(chat.asked) == 8


def test_another_constitution_labels_anew_and_an_answer_that_was_kept_costs_nothing(
    store: LabelStore, chat: Chat, tmp_path: Path
) -> None:
    run(store, chat, tmp_path)
    chat.say = lambda text: "B" if longer(text) == "A" else "A"
    done, _ = run(store, chat, tmp_path, BRIEF)
    assert done.choices == {"b": 4}
    assert {label.choice for label in store.current_labels()} == {"b"}
    with closing(memory_store(*ASKED)) as other:
        again, cost = run(other, chat, tmp_path)
        assert (again.choices, cost.requests) == ({"a": 4}, 0)


def test_imported_labels_of_the_model_are_not_asked_for_again(store: LabelStore, chat: Chat, tmp_path: Path) -> None:
    """Ties and skips, too; a label of another constitution or of an unknown one is none."""
    chat.say = lambda text: "A" if "prompt 0" in text else longer(text)
    run(store, chat, tmp_path)
    with closing(memory_store(*ASKED)) as other:
        for label in store.current_labels():
            other.save_label(label)
        for _ in range(2):
            done, cost = run(other, chat, tmp_path / "elsewhere")
            assert (done.choices, cost.requests) == ({}, 0)
        _, cost = run(other, chat, tmp_path / "elsewhere", BRIEF)
        assert cost.requests == 8


@pytest.mark.parametrize(
    ("one", "other", "choice"),
    [
        ("A", "B", ("a", None)),
        ("B", "A", ("b", None)),
        ("tie", "tie", ("tie", None)),
        ("A", "A", ("skip", "the answer changes with the order of the two responses")),
        ("A", "tie", ("skip", "the answer changes with the order of the two responses")),
        ("A", "unclear", ("skip", "an answer is unclear")),
    ],
)
def test_answers_in_both_orders_make_one_label(one: str, other: str, choice: tuple[str, str | None]) -> None:
    assert combine_orders(one, other) == choice  # type: ignore[arg-type]


def test_contradictions_and_unclear_answers_are_skips_that_are_counted(
    store: LabelStore, chat: Chat, tmp_path: Path
) -> None:
    chat.say = lambda text: "who knows" if "prompt 0" in text else "A"
    done, _ = run(store, chat, tmp_path)
    assert (done.choices, done.contradictions, done.unclear) == ({"skip": 4}, 3, 1)
    assert (done.first, done.clear) == (6, 6)
    reasons = ["an answer is unclear", *["the answer changes with the order of the two responses"] * 3]
    comments = sorted(label.comment or "" for label in store.current_labels())
    assert comments == [f"constitution kind; {reason}" for reason in reasons]


def test_a_run_stops_at_its_budget_and_the_next_goes_on(store: LabelStore, chat: Chat, tmp_path: Path) -> None:
    done, cost = run(store, chat, tmp_path, max_requests=5)
    assert (cost.requests, done.choices, done.left) == (4, {"a": 2}, 2)
    done, cost = run(store, chat, tmp_path, max_tokens=TOKENS)
    assert (cost.requests, done.choices, done.left) == (2, {"a": 1}, 1)
    done, cost = run(store, chat, tmp_path)
    assert (cost.requests, done.left, len(chat.asked)) == (2, 0, 8)


def test_requests_keep_their_pace_and_kept_answers_do_not_wait(
    store: LabelStore, chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that only sleeping moves: 30 a minute are two seconds apart; the first has no one before it."""
    waits: list[float] = []
    monkeypatch.setattr(ai_labels, "time", SimpleNamespace(monotonic=lambda: sum(waits), sleep=waits.append))
    run(store, chat, tmp_path, per_minute=30)
    assert waits == [0.0] + [2.0] * 7
    waits.clear()
    with closing(memory_store(*ASKED)) as other:
        run(other, chat, tmp_path, per_minute=30)
    assert waits == [0.0] * 8


def test_after_a_failure_only_the_rest_is_asked(store: LabelStore, chat: Chat, tmp_path: Path) -> None:
    chat.fails_after = 3
    with pytest.raises(SourceError, match="HTTP 500"):
        run(store, chat, tmp_path)
    assert len(store.current_labels()) == 1
    chat.fails_after = None
    run(store, chat, tmp_path)
    assert len(store.current_labels()) == 4
    assert len(chat.asked) == len(set(chat.questions())) == 8


@pytest.mark.slow
def test_a_killed_run_goes_on_without_asking_again(chat: Chat, tmp_path: Path) -> None:
    """SIGKILL while the sixth question waits for its answer: five answers are kept, two labels are stored."""
    database = f"sqlite:///{tmp_path / 'labels.db'}"
    store = LabelStore(database)
    store.add_questions(ASKED)
    command = [sys.executable, "-m", "tests.support.killed_labelling", database, chat.url, str(tmp_path)]
    child = subprocess.Popen(command, cwd=ROOT)

    def deadly(question: str) -> str:
        if len(chat.asked) == 6:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        return longer(question)

    chat.say = deadly
    assert child.wait() == -signal.SIGKILL
    assert len(store.current_labels()) == 2
    chat.say = longer
    done, cost = run(store, chat, tmp_path)
    assert len(store.current_labels()) == 4
    assert (done.choices, cost.requests) == ({"a": 2}, 3)
    assert len(chat.asked) == 9, "only the question that waited was asked a second time"
    store.close()


def test_a_constitution_is_known_by_its_text(tmp_path: Path) -> None:
    path = tmp_path / "c.md"
    with pytest.raises(DataError, match="does not exist"):
        Constitution.read(path)
    path.write_text("Be kind.\n")
    first = Constitution.read(path)
    path.write_text("Be brief.\n")
    assert first.text == "Be kind."
    assert first.digest != Constitution.read(path).digest


def test_the_shipped_constitutions_are_short_lists_of_principles() -> None:
    for path in (ROOT / "infra" / "constitutions").glob("*.md"):
        text = Constitution.read(path).text
        assert len(re.findall(r"^\d\. ", text, re.MULTILINE)) >= 4
        assert len(text.split()) < 200


def test_a_name_too_long_for_a_labeller_is_an_error(store: LabelStore, chat: Chat, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="longer than a labeller's name may be"):
        run(store, chat, tmp_path, model="m" * 60)
