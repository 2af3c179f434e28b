"""The labelling database's operations, on SQLite and on PostgreSQL."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError

from tasks.core.errors import DataError
from tasks.labelling.answers import Answer, ConflictError, is_swapped
from tasks.labelling.store import LabelStore
from tests.unit.labelling.conftest import make_item, token

BETTER = Answer("a", strength=2)
SKIP = Answer("skip")

Opens = Callable[..., LabelStore]


def answer(store: LabelStore, labeller: str, said: Answer = BETTER) -> str:
    """Answer what is asked next; its id."""
    task = store.next_item(labeller)
    assert task
    store.record(labeller, task.item.id, token(), task.after, said)
    return task.item.id


def shown(store: LabelStore, labeller: str) -> str | None:
    task = store.next_item(labeller)
    return task.item.id if task else None


def answer_all(store: LabelStore, labeller: str) -> list[str]:
    """Answer until nothing is asked any more."""
    done = []
    while shown(store, labeller) is not None:
        done.append(answer(store, labeller))
    return done


def test_items_come_by_priority_and_only_once(store: LabelStore) -> None:
    store.add_items([make_item("low"), make_item("high", priority=2.0), make_item("mid", priority=1.0)])
    assert answer_all(store, "ann") == ["high", "mid", "low"]
    assert shown(store, "bob") is None, "each wanted one label, and has it"


def test_an_item_goes_to_as_many_as_it_wants_labels_of(store: LabelStore) -> None:
    store.add_labeller("cat", "hash")
    store.add_items([make_item("twice", labels_wanted=2), make_item("once")])
    assert answer_all(store, "ann") == ["twice", "once"]
    assert answer_all(store, "bob") == ["twice"]
    assert answer_all(store, "cat") == []


def test_what_is_on_a_screen_stays_there_and_is_nobody_elses(store: LabelStore) -> None:
    store.add_items([make_item("one"), make_item("two")])
    assert [shown(store, "ann"), shown(store, "ann"), shown(store, "bob")] == ["one", "one", "two"]
    store.add_labeller("cat", "hash")
    assert shown(store, "cat") is None
    assert (store.progress("cat").left, store.progress("cat").elsewhere) == (2, 2)


def test_a_screen_takes_one_of_the_labels_that_an_item_wants(store: LabelStore) -> None:
    store.add_items([make_item("one", labels_wanted=2)])
    store.add_labeller("cat", "hash")
    assert [shown(store, name) for name in ("ann", "bob", "cat")] == ["one", "one", None]


def test_an_item_left_lying_goes_to_another_and_both_answers_are_kept(open_store: Opens) -> None:
    store = open_store(lease_seconds=0)
    for name in ("ann", "bob"):
        store.add_labeller(name, "hash")
    store.add_items([make_item("one")])
    first, second = store.next_item("ann"), store.next_item("bob")
    assert first
    assert second
    store.record("bob", "one", token(), second.after, BETTER)
    store.record("ann", "one", token(), first.after, SKIP)
    assert [(label.labeller, label.choice) for label in store.current_labels()] == [("bob", "a"), ("ann", "skip")]


def test_after_a_crash_every_unanswered_item_is_asked_again(open_store: Opens, store: LabelStore) -> None:
    store.add_items([make_item("one"), make_item("two")])
    answer(store, "ann")
    assert shown(store, "ann") == "two"
    again = open_store()
    assert shown(again, "bob") == "two"


def test_a_skip_goes_to_somebody_else_and_not_back(store: LabelStore) -> None:
    store.add_items([make_item("one")])
    answer(store, "ann", SKIP)
    assert shown(store, "ann") is None
    assert answer_all(store, "bob") == ["one"]
    assert store.open_items() == (0, 1)


def test_labels_of_models_keep_nobody_from_being_asked(store: LabelStore) -> None:
    store.add_labeller("model:judge")
    store.add_items([make_item("one")])
    store.record("model:judge", "one", token(), 0, BETTER)
    assert answer_all(store, "ann") == ["one"]
    assert "model:judge" not in store.labellers()


def test_gold_goes_to_everybody_and_lies_among_the_others(store: LabelStore) -> None:
    ordinary = [make_item(f"item{number:02}", labels_wanted=2) for number in range(40)]
    gold = [make_item(f"gold{number}", gold="a") for number in range(10)]
    store.add_items([*ordinary, *gold])
    orders = [answer_all(store, name) for name in ("ann", "bob")]
    for order in orders:
        assert len(set(order)) == len(order) == 50
        places = [place for place, name in enumerate(order) if name.startswith("gold")]
        assert min(places) < 20
        assert max(places) > 20, f"bunched: {places}"
    assert orders[0] != orders[1]


def test_gold_comes_often_enough_among_many_items(store: LabelStore) -> None:
    store.add_items([make_item(f"item{number:03}") for number in range(300)])
    store.add_items([make_item(f"gold{number}", gold="b") for number in range(5)])
    names = [answer(store, "ann") for _ in range(100)]
    assert sum(name.startswith("gold") for name in names) == 5, "at their share, 5 of 305, it would be 1 or 2"


def test_the_same_click_twice_counts_once(store: LabelStore) -> None:
    store.add_items([make_item("one")])
    mark = token()
    first = store.record("ann", "one", mark, 0, BETTER)
    second = store.record("ann", "one", mark, 0, Answer("a", strength=2, seconds=3.0))
    assert (first.repeated, second.repeated) == (False, True)
    assert first.event.id == second.event.id
    assert len(store.current_labels()) == 1


@pytest.mark.parametrize("same_page", [True, False])
def test_another_answer_on_the_same_state_is_refused(store: LabelStore, same_page: bool) -> None:
    store.add_items([make_item("one")])
    mark = token()
    store.record("ann", "one", mark, 0, BETTER)
    with pytest.raises(ConflictError) as caught:
        store.record("ann", "one", mark if same_page else token(), 0, Answer("b", strength=1))
    assert caught.value.standing
    assert caught.value.standing.choice == "a"
    assert [label.choice for label in store.current_labels()] == ["a"]


def test_an_undone_answer_is_asked_again_with_what_it_said(store: LabelStore) -> None:
    store.add_items([make_item("one"), make_item("two")])
    said = Answer("b", strength=3, rating_a=1, rating_b=5, comment="so", swapped=True)
    store.record("ann", "one", token(), 0, said)
    label = store.last_label("ann")
    assert label
    mark = token()
    undone, again = (store.undo("ann", mark, label.id) for _ in range(2))
    assert (undone.repeated, again.repeated, again.event.id) == (False, True, undone.event.id)
    assert store.current_labels() == []
    task = store.next_item("ann")
    assert task
    assert (task.item.id, task.after, task.previous) == ("one", undone.event.id, said)
    store.record("ann", "one", token(), task.after, BETTER)
    assert [(item.choice, item.after) for item in store.current_labels()] == [("a", undone.event.id)]


def test_undoing_goes_back_answer_by_answer(store: LabelStore) -> None:
    store.add_items([make_item("one"), make_item("two", priority=-1)])
    answer_all(store, "ann")
    asked = []
    while label := store.last_label("ann"):
        store.undo("ann", token(), label.id)
        asked.append(shown(store, "ann"))
    assert asked == ["two", "one"]
    assert store.progress("ann").done == 0


def test_nobody_undoes_what_is_not_theirs_or_stands_no_more(store: LabelStore) -> None:
    store.add_items([make_item("one")])
    label = store.record("ann", "one", token(), 0, BETTER).event
    with pytest.raises(DataError, match=f"bob has given no answer of number {label.id}"):
        store.undo("bob", token(), label.id)
    undone = store.undo("ann", token(), label.id).event
    with pytest.raises(ConflictError):
        store.undo("ann", token(), label.id)
    with pytest.raises(DataError, match="no answer of number"):
        store.undo("ann", token(), undone.id)


def test_items_are_added_once_and_never_change(store: LabelStore) -> None:
    assert store.add_items([make_item("one"), make_item("two")]) == 2
    assert store.add_items([make_item("two"), make_item("three")]) == 1
    with pytest.raises(DataError, match="'one' is in the database with other texts"):
        store.add_items([make_item("four"), make_item("one", prompt="another")])
    assert [item.id for item in store.items()] == ["one", "two", "three"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"choice": "c"},
        {"choice": "tie", "strength": 1},
        {"choice": "a", "strength": 4},
        {"choice": "a", "rating_a": 0},
        {"choice": "a", "rating_b": 6},
    ],
)
def test_an_answer_that_nobody_can_give_is_none(wrong: dict[str, object]) -> None:
    with pytest.raises(DataError):
        Answer(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", " ann", "model:", "x" * 65, "a\nb", "-x"])
def test_a_name_is_a_name(store: LabelStore, name: str) -> None:
    with pytest.raises(DataError, match="is no name for a labeller"):
        store.add_labeller(name, "hash")


def test_an_item_or_labeller_that_is_not_there_gets_no_event(store: LabelStore) -> None:
    store.add_items([make_item("one")])
    for labeller, item in (("ann", "two"), ("eve", "one")):
        with pytest.raises(DataError, match="is in the database"):
            store.record(labeller, item, token(), 0, BETTER)


def test_the_order_shown_is_even_and_stays() -> None:
    sides = [is_swapped(f"item{number}", "ann") for number in range(1000)]
    assert 440 < sum(sides) < 560  # 500 ± 3.8 standard deviations
    assert sides == [is_swapped(f"item{number}", "ann") for number in range(1000)]
    assert sides != [is_swapped(f"item{number}", "bob") for number in range(1000)]


def test_turning_exchanges_the_sides_and_turning_again_gives_the_same() -> None:
    said = Answer("a", strength=1, rating_a=4, rating_b=2, swapped=True)
    assert said.turned() == Answer("b", strength=1, rating_a=2, rating_b=4, swapped=True)
    assert said.turned().turned() == said
    assert Answer("a").turned() == Answer("a")


@pytest.mark.parametrize("change", ["update events set choice = 'b'", "delete from events"])
def test_the_database_itself_keeps_every_event(store: LabelStore, url: str, change: str) -> None:
    store.add_items([make_item("one")])
    store.record("ann", "one", token(), 0, BETTER)
    engine = create_engine(url)
    with pytest.raises(DBAPIError, match="events are only ever added"), engine.begin() as connection:
        connection.execute(text(change))
    engine.dispose()
    assert [label.choice for label in store.current_labels()] == ["a"]


def test_eight_at_once_give_exactly_what_is_wanted(store: LabelStore) -> None:
    names = [f"person{number}" for number in range(8)]
    for name in names:
        store.add_labeller(name, "hash")
    wanted = {f"item{number:02}": 1 + number % 3 for number in range(30)}
    store.add_items([make_item(name, labels_wanted=number) for name, number in wanted.items()])
    store.add_items([make_item(f"gold{number}", gold="a") for number in range(3)])
    start = threading.Barrier(8)

    def work(name: str) -> None:
        start.wait()
        while task := store.next_item(name):
            marks = [token(), token()]
            clicks = [(marks[0], BETTER), (marks[0], BETTER), (marks[1], Answer("tie"))]
            with ThreadPoolExecutor(3) as pool:
                sent = [pool.submit(store.record, name, task.item.id, mark, task.after, said) for mark, said in clicks]
            errors = [error for click in sent if (error := click.exception())]
            assert all(isinstance(error, ConflictError) for error in errors)
            assert len(errors) in (1, 2), "one of the two answers was first"

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, names))
    for name in names:
        answer_all(store, name)  # what was on others' screens when a thread found nothing more
    labels = store.current_labels()
    assert Counter(label.item_id for label in labels) == wanted | {f"gold{number}": 8 for number in range(3)}
    assert max(Counter((label.item_id, label.labeller) for label in labels).values()) == 1
