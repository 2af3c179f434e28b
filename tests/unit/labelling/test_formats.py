"""Argilla's and Label Studio's formats: what is exported comes back, once; what is malformed changes nothing."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.core.errors import DataError
from tasks.labelling.formats import FORMATS, Format, Record, dump, load
from tasks.labelling.labels import Label, flip, hide_names, pseudonym
from tasks.labelling.records import LABEL_STUDIO_CONFIG
from tasks.labelling.store import ImportResult, LabelStore
from tests.support.labels import memory_store, pair, token

KINDS: tuple[Format, ...] = ("argilla", "label-studio")
ASKED = [pair(1, labels_wanted=3), pair(2, gold="tie"), replace(pair(3, priority=0.25), reason="disagreement")]
LABELS = [
    Label(pair(1).id, "ann", "a", 2, 4, 1, "it's “better”\nby far"),
    Label(pair(1).id, "bob", "skip", swapped=True),
    Label(pair(1).id, "model:m-1", "b", comment="constitution 1"),
    Label(pair(2).id, "ann", "tie"),
    Label(pair(2).id, "bob", "both_bad", rating_a=1, rating_b=1, swapped=True),
    Label(pair(2).id, "model:m-1", "skip", comment="unclear"),
]


USER = "00000000-0000-4000-8000-000000000001"


def task(**values: Any) -> dict[str, Any]:
    """As Label Studio itself exports one."""
    result = [
        {"id": "x1", "type": "pairwise", "value": {"selected": "right"}, "origin": "manual",
         "to_name": "answer1,answer2", "from_name": "preference"},
    ]  # fmt: skip
    annotation = {"id": 9, "completed_by": 3, "result": result, "was_cancelled": False, "lead_time": 4.25}
    data = {"prompt": "p", "answer1": "x", "answer2": "y"}
    return {"id": 7, "data": data, "annotations": [annotation | values], "project": 1, "predictions": []}


def record(**values: Any) -> dict[str, Any]:
    """As Argilla 2 itself writes one: no status in the responses."""
    fields = {"prompt": "p", "response_a": "x", "response_b": "y"}
    responses = {name: [{"value": value, "user_id": USER}] for name, value in values.items()}
    return {"id": "0", "fields": fields, "metadata": {}, "suggestions": {}, "vectors": {}, "status": "completed",
            "responses": responses, "_server_id": "5e"}  # fmt: skip


def preferred(*responses: dict[str, Any]) -> dict[str, Any]:
    return record() | {"responses": {"preference": list(responses)}}


def load_all(folder: Path, kind: Format, *records: Any, **options: Any) -> list[Record]:
    """Read them from a file."""
    path = folder / "theirs.json"
    path.write_text(json.dumps(records))
    return load(path, kind, **options)


def fill(store: LabelStore) -> None:
    store.add_questions(ASKED)
    for label in LABELS:
        store.save_label(label)


def exported(folder: Path, kind: Format, labels: list[Label] = LABELS) -> Path:
    path = folder / "labels.json"
    path.write_text(dump(ASKED, labels, kind), encoding="utf-8")
    return path


@pytest.fixture
def other() -> Iterator[LabelStore]:
    """Another empty store."""
    with closing(memory_store()) as store:
        yield store


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_exported_comes_back_the_same_and_only_once(tmp_path: Path, store: LabelStore, kind: Format) -> None:
    found = load(exported(tmp_path, kind), kind)
    assert store.import_records(found) == ImportResult(3, 3, 6, 6)
    assert sorted(store.current_labels(), key=repr) == sorted(LABELS, key=repr)
    assert {item.id: item for item in store.questions()} == {item.id: item for item in ASKED}
    assert store.import_records(found) == ImportResult(3, 0, 6, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_pseudonyms_find_their_person_where_the_person_is_known(
    tmp_path: Path, store: LabelStore, other: LabelStore, kind: Format
) -> None:
    path = exported(tmp_path, kind, hide_names(LABELS))
    assert not re.search(r"\bann\b", path.read_text())
    fill(store)
    assert store.import_records(load(path, kind)).new_labels == 0, "labels of this very database came twice"
    other.add_labeller("ann")
    other.import_records(load(path, kind))
    assert {label.labeller for label in other.current_labels()} == {"ann", pseudonym("bob"), "model:m-1"}


def moved(kind: Format, folder: Path, source: LabelStore, target: LabelStore) -> ImportResult:
    """All that one database holds, by way of a file, to another."""
    path = folder / "moved.json"
    path.write_text(dump(source.questions(), hide_names(source.current_labels()), kind), encoding="utf-8")
    return target.import_records(load(path, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_again_nobody_votes_twice(
    tmp_path: Path, store: LabelStore, other: LabelStore, kind: Format
) -> None:
    fill(store)
    assert moved(kind, tmp_path, store, other).new_labels == 6
    assert moved(kind, tmp_path, other, store).new_labels == 0
    assert moved(kind, tmp_path, store, other).new_labels == 0
    assert {label.labeller for label in store.current_labels()} == {"ann", "bob", "model:m-1"}
    other.add_labeller("ann")
    assert moved(kind, tmp_path, store, other).new_labels == 0, "who joins by name later got a second vote"


@pytest.mark.parametrize("kind", KINDS)
def test_an_older_file_does_not_bring_old_opinions_back(
    tmp_path: Path, store: LabelStore, other: LabelStore, kind: Format
) -> None:
    fill(store)
    moved(kind, tmp_path, store, other)
    changed, undone = (label for label in store.current_labels() if label.labeller == "ann")
    store.save_label(replace(changed, choice="tie", strength=None))
    store.undo("ann", token=token(), event_id=undone.event_id)
    now = store.current_labels()
    assert moved(kind, tmp_path, other, store) == ImportResult(3, 0, 6, 0)
    assert store.current_labels() == now


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_that_is_known_the_other_way_round_keeps_its_meaning(
    tmp_path: Path, store: LabelStore, kind: Format
) -> None:
    item = pair(1)
    turned = replace(item, response_a=item.response_b, response_b=item.response_a)
    assert turned.id == item.id
    store.add_questions([turned])
    store.import_records(load(exported(tmp_path, kind, LABELS[:1]), kind))
    assert store.current_labels() == [flip(LABELS[0])]


def test_label_studio_keeps_the_time_that_a_label_took(tmp_path: Path, store: LabelStore) -> None:
    label = replace(LABELS[0], seconds=12.5)
    store.import_records(load(exported(tmp_path, "label-studio", [label]), "label-studio"))
    assert store.current_labels() == [label]


def test_other_programs_labellers_get_a_name_with_its_origin(tmp_path: Path, store: LabelStore) -> None:
    store.import_records(load_all(tmp_path, "label-studio", task()))
    store.import_records(load_all(tmp_path, "argilla", record(preference="b")))
    assert [(label.labeller, label.choice) for label in store.current_labels()] == [
        (f"argilla:{USER}", "b"), ("label-studio:3", "b"),
    ]  # fmt: skip
    assert len(store.questions()) == 1, "the same texts are the same question"
    annotation = FORMATS["label-studio"][0](pair(1), [Label(pair(1).id, "label-studio:3", "b")])["annotations"][0]
    assert annotation["completed_by"] == 3
    response = FORMATS["argilla"][0](pair(1), [Label(pair(1).id, f"argilla:{USER}", "b")])["responses"]["preference"][0]
    assert response["user_id"] == USER, "Argilla would count the label as another person's"


def test_drafts_are_no_labels_and_discarded_ones_are_skips(tmp_path: Path) -> None:
    other = USER[:-1] + "2"
    responses = [{"value": "a", "user_id": USER, "status": "draft"}, {"value": None, "user_id": other}]
    ((_, labels),) = load_all(tmp_path, "argilla", preferred(*responses))
    assert [(label.labeller, label.choice) for label in labels] == [(f"argilla:{other}", "skip")]


GOOD = {"argilla": record(preference="a"), "label-studio": task()}
FLAWS: list[tuple[Format, Any, str]] = [
    ("argilla", 7, "not an object but int"),
    ("argilla", {"id": 1}, "fields: dict expected, got 'None'"),
    ("argilla", record(preference="c"), "choice: 'c' is none of a, b"),
    ("argilla", preferred({"value": "a", "user_id": "3"}), "user_id: '3' is no UUID"),
    ("argilla", record(comment="x"), "and not preference"),
    ("argilla", record(preference="a", comment="x" * 5001), "comment: 5001 characters, at most 5000 are kept"),
    ("argilla", record() | {"metadata": {"labellers": [{"a": 1}]}}, "labellers: a list of str expected"),
    ("argilla", record() | {"metadata": {"labels_wanted": -1}}, "labels_wanted: -1 should be from 0 to 1000"),
    ("argilla", record() | {"metadata": {"priority": math.nan}}, "priority: a number expected, got 'nan'"),
    ("argilla", record() | {"responses": {"preference": None}}, "preference: list expected, got 'None'"),
    ("label-studio", task(result=[7]), "not an object but int"),
    ("argilla", record(preference="a", rating_a=math.inf), "rating_a: a number expected, got 'inf'"),
    ("argilla", record() | {"fields": record()["fields"] | {"prompt": "\0"}}, "prompt: holds a NUL character"),
    ("argilla", record() | {"metadata": {"policy_b": "x" * 65}}, "policy_b: 65 characters, at most 64 are kept"),
    ("argilla", record() | {"metadata": {"question_id": "0"}}, "its id does not fit its texts"),
    ("label-studio", task() | {"data": {"prompt": "p", "answer1": "x", "answer2": ""}}, "a response is empty"),
    ("label-studio", task(completed_by=None), "completed_by: a number or an object"),
    ("label-studio", task(result=[]), "result: either a side or one of tie and both_bad expected"),
    ("label-studio", task(lead_time="long"), "lead_time: a number expected"),
    ("label-studio", task() | {"data": {"prompt": "p", "answer1": "x", "answer2": "x"}}, "are the same text"),
    ("label-studio", task() | {"annotations": task()["annotations"] * 2}, "a labeller has two labels of it"),
]


@pytest.mark.parametrize(("kind", "bad", "reason"), FLAWS)
@pytest.mark.parametrize("lines", [True, False])
def test_a_malformed_record_is_reported_with_its_line_and_nothing_is_read(
    tmp_path: Path, kind: Format, bad: Any, reason: str, lines: bool
) -> None:
    path = tmp_path / "theirs.json"
    records = [json.dumps(item) for item in (GOOD[kind], bad)]
    path.write_text("\n\n".join(records) if lines else "[" + ",\n\n".join(records) + "]")
    with pytest.raises(DataError, match="1 of 2 records are malformed; nothing was imported:") as caught:
        load(path, kind)
    assert re.search(rf"theirs.json:3: .*{re.escape(reason)}", str(caught.value))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("cut", "reason"), [("[{},\n{", ":2: not JSON"), ("[", ":1: the list has no end")])
def test_a_file_that_was_cut_is_no_file(tmp_path: Path, kind: Format, cut: str, reason: str) -> None:
    path = tmp_path / "theirs.json"
    path.write_text(cut)
    with pytest.raises(DataError, match=rf"nothing was imported:\n(?s:.*){reason}"):
        load(path, kind)
    with pytest.raises(DataError, match="does not exist"):
        load(tmp_path / "none.json", kind)


def test_a_test_question_may_have_an_empty_response(tmp_path: Path) -> None:
    data = {"prompt": "p", "answer1": "x", "answer2": "", "gold": "a"}
    ((question, _),) = load_all(tmp_path, "label-studio", task() | {"data": data})
    assert question.gold == "a"


def test_a_question_that_is_known_keeps_what_it_had_and_that_is_counted(tmp_path: Path, store: LabelStore) -> None:
    """The second is stored the other way round, where the known answer a means b; the third is as it was."""
    stored = [pair(1), pair(2, gold="b"), pair(3)]
    turned = replace(stored[1], response_a=stored[1].response_b, response_b=stored[1].response_a)
    store.add_questions([stored[0], turned, stored[2]])
    path = tmp_path / "questions.json"
    for other, kept in (([pair(1, gold="a"), pair(2, gold="a"), pair(3)], 1), ([pair(1, labels_wanted=2), pair(2)], 2)):
        path.write_text(dump(other, [], "argilla"))
        assert store.import_records(load(path, "argilla")) == ImportResult(len(other), 0, 0, 0, kept)
    assert {item.id: item for item in store.questions()} == {item.id: item for item in (pair(1), turned, pair(3))}


def test_a_line_ends_where_json_lines_say(tmp_path: Path) -> None:
    path = tmp_path / "theirs.jsonl"
    odd = record() | {"fields": {"prompt": "p\u2029q", "response_a": "x\u2028y", "response_b": "z\x85"}}
    path.write_text("\r\n".join(json.dumps(line, ensure_ascii=False) for line in (odd, record())))
    assert [question.prompt for question, _ in load(path, "argilla")] == ["p\u2029q", "p"]


def test_responses_without_a_status_are_a_warning(tmp_path: Path) -> None:
    """As Argilla's own writer leaves them, be they drafts or not."""
    warnings: list[str] = []
    submitted = preferred({"value": "a", "user_id": USER, "status": "submitted"})
    load_all(tmp_path, "argilla", submitted, warn=warnings.append)
    assert warnings == []
    load_all(tmp_path, "argilla", record(preference="a"), record(), warn=warnings.append)
    (warning,) = warnings
    assert warning.startswith("1 of 2 records have responses without a status: drafts and discarded answers cannot be")


def test_label_studio_names_only_people_it_can_know_and_gives_all_names_back() -> None:
    names = ["ann", "ann@here.org", "label-studio:7", f"argilla:{USER}", "a/b"]
    labels = [Label(pair(1).id, name, "skip") for name in names]
    to_record, from_record = FORMATS["label-studio"]
    written = to_record(pair(1), labels)
    known = [annotation.get("completed_by") for annotation in written["annotations"]]
    assert known == [None, {"email": "ann@here.org"}, 7, None, None], "it refuses an e-mail address it does not know"
    for annotation in written["annotations"]:
        annotation["completed_by"] = 1  # whoever uploaded the file
    assert from_record(written)[1] == labels


def test_an_annotation_that_began_as_a_prediction_is_a_persons() -> None:
    to_record, from_record = FORMATS["label-studio"]
    written = to_record(pair(1), [Label(pair(1).id, "model:m", "a")])
    written["annotations"] = [{"completed_by": 4, "result": written["predictions"][0]["result"]}]
    assert [label.labeller for label in from_record(written)[1]] == ["label-studio:4", "model:m"]


def test_each_name_in_a_task_is_one_of_the_interface() -> None:
    root = ElementTree.fromstring(LABEL_STUDIO_CONFIG)
    names = {element.get("name"): element for element in root.iter() if element.get("name")}
    to_record, _ = FORMATS["label-studio"]
    written = to_record(ASKED[0], [replace(LABELS[0], labeller="ann"), replace(LABELS[4], labeller="bob")])
    for annotation in written["annotations"]:
        for part in annotation["result"]:
            control = names[part["from_name"]]
            assert part["type"] == control.tag.lower()
            assert part["to_name"] in [*(control.get("toName") or "").split(","), control.get("name")]
    shown = {(element.get("value") or "").removeprefix("$") for element in root.iter("Text")}
    assert shown <= set(written["data"])
    assert {choice.get("value") for choice in root.iter("Choice")} == {"tie", "both_bad"}


def test_a_question_without_labels_is_a_task_to_do() -> None:
    argilla, studio = (FORMATS[kind][0](ASKED[2], []) for kind in KINDS)
    assert (argilla["status"], argilla["responses"]) == ("pending", {})
    assert (studio["annotations"], studio["predictions"]) == ([], [])
