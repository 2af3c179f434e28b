"""The labelling database's operations, on SQLite and on PostgreSQL."""

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Connection, insert, text
from sqlalchemy.exc import DBAPIError

from tasks.core.errors import DataError, SourceError
from tasks.labelling import database
from tasks.labelling.export import export_preferences
from tasks.labelling.labels import Label, hide_names, pseudonym
from tasks.labelling.store import ConflictError, LabelStore, LabelTask, SaveResult
from tests.support.labels import begun, make_question, pair, token

Opens = Callable[..., LabelStore]
NAMES = ["ann", "bob", "cat"]


@pytest.fixture
def store(open_store: Opens) -> LabelStore:
    """With three labellers, and no question."""
    store = open_store()
    for name in NAMES:
        store.add_labeller(name, "hash")
    return store


def save(
    store: LabelStore, labeller: str, question: str, previous: int = 0, mark: str = "", **values: Any
) -> SaveResult:
    """Save an answer as the page does."""
    label = Label(question, labeller, **{"choice": "a", **values})
    return store.save_label(label, token=mark or token(), previous_event=previous)


def answer(store: LabelStore, labeller: str, choice: str = "a") -> str:
    """Answer what is asked next; its id."""
    task = store.next_task(labeller)
    assert task
    save(store, labeller, task.question.id, task.previous_event, choice=choice)
    return task.question.id


def shown(store: LabelStore, labeller: str) -> str | None:
    task = store.next_task(labeller)
    return task.question.id if task else None


def answer_all(store: LabelStore, labeller: str) -> list[str]:
    """Answer until nothing is asked any more."""
    done = []
    while shown(store, labeller) is not None:
        done.append(answer(store, labeller))
    return done


def test_questions_come_by_priority_and_only_once(store: LabelStore) -> None:
    store.add_questions([make_question("low"), make_question("high", priority=2.0), make_question("mid", priority=1.0)])
    assert answer_all(store, "ann") == ["high", "mid", "low"]
    assert shown(store, "bob") is None, "each wanted one label, and has it"


def test_a_question_goes_to_as_many_people_as_it_wants_labels(store: LabelStore) -> None:
    store.add_questions([make_question("twice", labels_wanted=2), make_question("once")])
    assert [answer_all(store, name) for name in NAMES] == [["twice", "once"], ["twice"], []]


def test_what_is_on_a_screen_stays_there_and_is_nobody_elses(store: LabelStore) -> None:
    store.add_questions([make_question("one"), make_question("two")])
    assert [shown(store, "ann"), shown(store, "ann"), shown(store, "bob")] == ["one", "one", "two"]
    assert shown(store, "cat") is None
    assert (store.progress("cat").left, store.progress("cat").leased_to_others) == (2, 2)


def test_a_pseudonym_and_its_name_are_one_labeller(store: LabelStore) -> None:
    """Labels that came back under pseudonyms before their people were known here."""
    store.add_questions([make_question("one", labels_wanted=3), make_question("two", labels_wanted=3)])
    for question in ("one", "two"):
        store.save_label(Label(question, pseudonym("eve"), "a"))
    store.add_labeller("eve", "hash")
    assert shown(store, "eve") is None, "she has answered both"
    assert {label.labeller for label in store.current_labels()} == {"eve"}
    save(store, "eve", "one", choice="b")
    taken_back = save(store, "eve", "two", choice="tie").event_id
    assert [(label.labeller, label.choice) for label in store.current_labels()] == [("eve", "b"), ("eve", "tie")]
    exported = export_preferences(store.questions(), hide_names(store.current_labels()), aggregate="none")
    assert [row.id for row in exported.rows] == [f"one/{pseudonym('eve')}"]
    store.undo("eve", token=token(), event_id=taken_back)
    assert [label.choice for label in store.current_labels()] == ["b"], "her last word on it was that she has none"


def test_a_screen_takes_one_of_the_labels_that_a_question_wants(store: LabelStore) -> None:
    store.add_questions([make_question("one", labels_wanted=2)])
    assert [shown(store, name) for name in NAMES] == ["one", "one", None]


def test_an_expired_lease_goes_to_another_and_both_answers_are_kept(open_store: Opens, store: LabelStore) -> None:
    hasty = open_store(lease_seconds=0)
    store.add_questions([make_question("one")])
    assert [shown(hasty, name) for name in ("ann", "bob")] == ["one", "one"]
    save(hasty, "bob", "one")
    save(hasty, "ann", "one", choice="skip")
    assert [(label.labeller, label.choice) for label in store.current_labels()] == [("ann", "skip"), ("bob", "a")]


def test_after_a_crash_every_unanswered_question_is_asked_again(open_store: Opens, store: LabelStore) -> None:
    store.add_questions([make_question("one"), make_question("two")])
    answer(store, "ann")
    assert shown(store, "ann") == "two"
    again = open_store()
    assert shown(again, "bob") == "two"


def test_a_skip_goes_to_somebody_else_and_not_back(store: LabelStore) -> None:
    store.add_questions([make_question("one")])
    answer(store, "ann", "skip")
    assert shown(store, "ann") is None
    assert answer_all(store, "bob") == ["one"]
    assert store.open_questions() == (0, 1)


def test_labels_of_models_keep_nobody_from_being_asked(store: LabelStore) -> None:
    store.add_questions([make_question("one")])
    store.save_label(Label("one", "model:judge", "a"))
    assert answer_all(store, "ann") == ["one"]
    assert "model:judge" not in store.labellers()


def test_gold_goes_to_everybody_and_lies_among_the_others(store: LabelStore) -> None:
    ordinary = [make_question(f"item{number:02}", labels_wanted=2) for number in range(40)]
    gold = [make_question(f"gold{number}", gold="a") for number in range(10)]
    store.add_questions([*ordinary, *gold])
    orders = [answer_all(store, name) for name in ("ann", "bob")]
    for order in orders:
        assert len(set(order)) == len(order) == 50
        places = [place for place, name in enumerate(order) if name.startswith("gold")]
        assert min(places) < 20 < max(places), f"bunched: {places}"
    assert orders[0] != orders[1]


def test_gold_comes_often_enough_among_many_questions(store: LabelStore) -> None:
    store.add_questions([make_question(f"item{number:03}") for number in range(300)])
    store.add_questions([make_question(f"gold{number}", gold="b") for number in range(5)])
    names = [answer(store, "ann") for _ in range(100)]
    assert sum(name.startswith("gold") for name in names) == 5, "at their share, 5 of 305, it would be 1 or 2"


def test_the_same_click_twice_counts_once(store: LabelStore) -> None:
    store.add_questions([make_question("one")])
    mark = token()
    first, second = (save(store, "ann", "one", mark=mark, strength=2, seconds=seconds) for seconds in (None, 3.0))
    assert second == replace(first, duplicate=True) != first
    assert len(store.current_labels()) == 1


@pytest.mark.parametrize("same_page", [True, False])
def test_another_answer_on_the_same_state_is_refused(store: LabelStore, same_page: bool) -> None:
    store.add_questions([make_question("one")])
    mark = token()
    save(store, "ann", "one", mark=mark)
    with pytest.raises(ConflictError) as caught:
        save(store, "ann", "one", mark=mark if same_page else token(), choice="b", strength=1)
    assert [caught.value.standing] == store.current_labels() == [Label("one", "ann", "a")]


def test_an_undone_answer_is_asked_again_with_its_values(store: LabelStore) -> None:
    store.add_questions([make_question("one"), make_question("two")])
    undone = Label("one", "ann", "b", 3, 1, 5, "so", swapped=True)
    event_id = store.save_label(undone, token=token(), previous_event=0).event_id
    assert store.last_label("ann") == undone
    mark = token()
    undo, again = (store.undo("ann", token=mark, event_id=event_id) for _ in range(2))
    assert (undo.duplicate, again) == (False, SaveResult(undo.event_id, duplicate=True))
    assert store.current_labels() == []
    assert store.next_task("ann") == LabelTask(make_question("one"), undo.event_id, undone)
    save(store, "ann", "one", undo.event_id)
    assert [label.choice for label in store.current_labels()] == ["a"]
    assert [label.choice for label in store.recorded_labels("ann")] == ["b", "a"]


def test_undoing_goes_back_answer_by_answer(store: LabelStore) -> None:
    store.add_questions([make_question("one"), make_question("two", priority=-1)])
    answer_all(store, "ann")
    asked = []
    while label := store.last_label("ann"):
        store.undo("ann", token=token(), event_id=label.event_id)
        asked.append(shown(store, "ann"))
    assert asked == ["two", "one"]
    assert store.progress("ann").done == 0


def test_nobody_undoes_what_is_not_theirs_or_not_current(store: LabelStore) -> None:
    store.add_questions([make_question("one")])
    event_id = save(store, "ann", "one").event_id
    with pytest.raises(DataError, match=f"bob has given no answer of number {event_id}"):
        store.undo("bob", token=token(), event_id=event_id)
    undo = store.undo("ann", token=token(), event_id=event_id)
    with pytest.raises(ConflictError) as caught:
        store.undo("ann", token=token(), event_id=event_id)
    assert caught.value.standing is None
    with pytest.raises(DataError, match="no answer of number"):
        store.undo("ann", token=token(), event_id=undo.event_id)


def test_questions_are_added_once_and_never_change(store: LabelStore) -> None:
    one, two, three = (make_question(name) for name in ("one", "two", "three"))
    assert store.add_questions([one, two, one]).new_questions == 2
    assert store.add_questions([two, three]).new_questions == 1
    with pytest.raises(DataError, match="'one' is in the database with other texts"):
        store.add_questions([make_question("four"), replace(one, prompt="another")])
    first = make_question("first", priority=1.0, gold="b", labels_wanted=2)
    store.add_questions([first])
    assert store.questions() == [first, one, two, three], "higher priority first, then as they were added"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"response_b": "x\0"}, "response_b: holds a NUL character"),
        ({"policy_a": "x" * 65}, "policy_a: 65 characters"),
        ({"policy_a": "\ud800"}, "policy_a: surrogates not allowed"),
    ],
)
def test_what_no_database_keeps_is_not_added(store: LabelStore, change: dict[str, str], reason: str) -> None:
    with pytest.raises(DataError, match=f"'prompt 2': {reason}.*nothing was added: leave it out"):
        store.add_questions([pair(1), replace(pair(2), **change)])
    assert store.questions() == []


def test_a_label_without_a_page_follows_the_last_event(store: LabelStore) -> None:
    store.add_questions([make_question("one")])
    first = Label("one", "eve", "a", 2, 4, 1, "why", swapped=True, seconds=3.5)
    start = store.save_label(first).event_id
    assert store.save_label(replace(first, seconds=9.0)).duplicate, "the same opinion again"
    assert store.current_labels() == [first]
    second = replace(first, choice="tie", strength=None)
    assert not store.save_label(second).duplicate
    assert store.current_labels() == [second]
    assert not store.save_label(first).duplicate, "back to the first opinion is a change, too"
    store.undo("eve", token=token(), event_id=start + 2)
    assert store.current_labels() == []
    assert not store.save_label(second, token="own").duplicate
    assert store.save_label(first, token="own").duplicate, "an event of that token is there"
    assert store.labellers() == NAMES, "eve is added, and has no password"


def test_an_answer_that_nobody_can_give_is_refused(store: LabelStore) -> None:
    store.add_questions([make_question("one")])
    with pytest.raises(DataError, match=r"^rating: "):
        save(store, "ann", "one", rating_b=6)
    assert store.current_labels() == []


@pytest.mark.parametrize("name", ["", " ann", "model:", "x" * 65, "a\nb", "-x"])
def test_a_name_is_a_name(store: LabelStore, name: str) -> None:
    with pytest.raises(DataError, match="is no name for a labeller"):
        store.add_labeller(name, "hash")


def test_an_unknown_question_or_labeller_gets_no_event(store: LabelStore) -> None:
    store.add_questions([make_question("one")])
    for labeller, question in (("ann", "two"), ("eve", "one")):
        with pytest.raises(DataError, match="is in the database"):
            save(store, labeller, question)


@pytest.mark.parametrize("change", ["update events set choice = 'b'", "delete from events"])
def test_the_database_itself_keeps_every_event(store: LabelStore, url: str, change: str) -> None:
    store.add_questions([make_question("one")])
    save(store, "ann", "one")
    with pytest.raises(DBAPIError, match="events are only ever added"), begun(url) as connection:
        connection.execute(text(change))
    assert [label.choice for label in store.current_labels()] == ["a"]


def test_eight_at_once_give_exactly_what_is_wanted(store: LabelStore) -> None:
    names = [f"person{number}" for number in range(8)]
    for name in names:
        store.add_labeller(name, "hash")
    wanted = {f"item{number:02}": 1 + number % 3 for number in range(30)}
    store.add_questions([make_question(name, labels_wanted=number) for name, number in wanted.items()])
    store.add_questions([make_question(f"gold{number}", gold="a") for number in range(3)])
    start = threading.Barrier(8)

    def work(name: str) -> None:
        start.wait()
        while task := store.next_task(name):
            marks = [token(), token()]
            clicks = [(marks[0], "a"), (marks[0], "a"), (marks[1], "tie")]
            place = (name, task.question.id, task.previous_event)
            with ThreadPoolExecutor(3) as pool:
                sent = [pool.submit(save, store, *place, mark=mark, choice=choice) for mark, choice in clicks]
            errors = [error for click in sent if (error := click.exception())]
            assert all(isinstance(error, ConflictError) for error in errors)
            assert len(errors) in (1, 2), "one of the two answers was first"

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, names))
    for name in names:
        answer_all(store, name)  # what was on others' screens when a thread found nothing more
    labels = store.current_labels()
    assert Counter(label.question_id for label in labels) == wanted | {f"gold{number}": 8 for number in range(3)}
    assert max(Counter((label.question_id, label.labeller) for label in labels).values()) == 1


def test_what_another_connection_wrote_is_looked_at_again_and_then_an_error(store: LabelStore) -> None:
    twice, attempts = [{"name": "eve"}, {"name": "eve"}], []

    def work(connection: Connection) -> None:
        attempts.append(1)
        connection.execute(insert(database.labellers), twice)

    with pytest.raises(SourceError, match=r"has changed meanwhile.*: run again"):
        store._write(work)
    assert len(attempts) == 2
