"""Labels as preferences: every label or the aggregate, nothing left out uncounted, equal labels as equal bytes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tasks.config.data import PrepareParams
from tasks.core.paths import Artifacts
from tasks.core.rows import Preference, write_rows
from tasks.labelling.export import Aggregate, ExportResult, export_preferences
from tasks.labelling.labels import Label, Question, hide_names, pseudonym
from tasks.prepare import prepare
from tests.support.labels import labels_of, pair
from tests.support.tokenizers import write_tokenizer

AGREED, SPLIT, ALIKE, GOLD, OPEN = pair(1), pair(2), pair(3), pair(4, gold="a"), pair(5)
QUESTIONS = [AGREED, SPLIT, ALIKE, GOLD, OPEN]
LABELS = [
    *labels_of(AGREED, ann="a 2", bob="a 3", eve="b 1"),
    *labels_of(SPLIT, ann="b", bob="a"),
    *labels_of(ALIKE, ann="tie", bob="both_bad", eve="skip"),
    *labels_of(GOLD, ann="a", bob="b"),
]


def exported(labels: list[Label], aggregate: Aggregate, asked: list[Question] = QUESTIONS) -> ExportResult:
    return export_preferences(asked, hide_names(labels), aggregate=aggregate)


def test_every_label_is_a_row_that_names_its_labeller() -> None:
    found = exported(LABELS, "none")
    assert found.dropped == {"both_bad": 1, "gold": 2, "skip": 1, "tie": 1}
    assert len(found.rows) + sum(found.dropped.values()) == len(LABELS)
    assert [row.id for row in found.rows] == sorted(row.id for row in found.rows)
    rows = {(row.prompt, (row.labelled_by or ("",))[0]): row for row in found.rows}
    ann, eve = rows["prompt 1", pseudonym("ann")], rows["prompt 1", pseudonym("eve")]
    assert (ann.chosen, ann.rejected, ann.margin) == (AGREED.response_a, AGREED.response_b, 2.0)
    assert (eve.chosen, eve.rejected, eve.margin) == (AGREED.response_b, AGREED.response_a, 1.0)
    assert rows["prompt 2", pseudonym("ann")].margin is None
    assert found.card["disputed"] == 3
    assert found.card["agreement"] == {"agree": 1, "of": 5}


def test_the_majority_carries_its_share_and_mean_strength() -> None:
    """Strengths toward a: 2, 3 and −1, so 4/3 on average."""
    found = exported(LABELS, "majority")
    (row,) = found.rows
    assert (row.id, row.chosen) == (AGREED.id, AGREED.response_a)
    assert (row.confidence, row.margin) == (pytest.approx(2 / 3, abs=1e-6), pytest.approx(4 / 3, abs=1e-6))
    assert row.labelled_by == tuple(sorted(map(pseudonym, ("ann", "bob", "eve"))))
    assert found.dropped == {"gold": 2, "no_majority": 2, "skip": 1}
    (other,) = exported(labels_of(OPEN, ann="b 2", bob="b 1", eve="tie"), "majority").rows
    assert (other.chosen, other.margin) == (OPEN.response_b, 1.0), "strengths 2, 1 and a tie's 0 toward b"


def test_a_label_without_strength_does_not_change_the_margin() -> None:
    """Strengths 3 and 1 toward a, a tie's 0, and a model without strength: 4/3."""
    labels = [*labels_of(OPEN, ann="a 3", bob="a 1", eve="tie"), Label(OPEN.id, "model:m", "a")]
    (row,) = exported(labels, "majority").rows
    assert row.margin == pytest.approx(4 / 3, abs=1e-6)
    (row,) = exported(labels_of(OPEN, ann="a", bob="a", eve="tie"), "majority").rows
    assert row.margin is None, "a tie alone gives no strength"


@pytest.mark.parametrize("aggregate", ["none", "majority"])
def test_a_pair_with_an_empty_response_is_dropped_and_counted(aggregate: Aggregate) -> None:
    empty = replace(pair(6), response_b="")
    found = exported(labels_of(empty, ann="a"), aggregate, [empty])
    assert (found.rows, found.dropped) == ([], {"empty_response": 1})


def test_dawid_skene_trusts_the_labeller_who_is_right_elsewhere() -> None:
    """Ann and Bob agree on twenty questions, Eve contradicts them on half; where Ann and Eve differ, Ann counts."""
    asked = [pair(number) for number in range(21)]
    labels = [
        label
        for number, item in enumerate(asked[:20])
        for label in labels_of(item, ann="ab"[number % 2], bob="ab"[number % 2], eve="ab"[number // 2 % 2])
    ]
    labels += labels_of(asked[20], ann="b", eve="a")
    found = exported(labels, "dawid-skene", asked)
    (row,) = (row for row in found.rows if row.prompt == "prompt 20")
    assert row.chosen == asked[20].response_b
    assert (row.confidence or 0) > 0.9
    assert len(found.rows) == 21


def test_equal_labels_are_equal_bytes_in_whichever_order_they_came(tmp_path: Path) -> None:
    for number, labels in enumerate((LABELS, LABELS[::-1])):
        found = exported(labels, "majority")
        write_rows(tmp_path / f"{number}.jsonl", found.rows)
        (tmp_path / f"{number}.json").write_text(json.dumps(found.card))
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "1.jsonl").read_bytes()
    assert (tmp_path / "0.json").read_bytes() == (tmp_path / "1.json").read_bytes()


def test_names_stand_in_no_row_unless_asked_for() -> None:
    found = exported(LABELS, "none")
    text = json.dumps([row.model_dump() for row in found.rows] + [found.card])
    assert not any(name in text for name in ("ann", "bob", "eve"))
    named = export_preferences(QUESTIONS, LABELS, aggregate="none")
    assert {row.labelled_by for row in named.rows} == {("ann",), ("bob",), ("eve",)}


def test_prepare_keeps_equal_labels_of_different_people(tmp_path: Path) -> None:
    """And a preference does not hide the right answer of its prompt."""
    rows = exported(LABELS, "none").rows
    for name, kind, own in (
        ("labels", "preferences", [*rows, rows[0].model_copy(update={"id": "again"})]),
        ("asked", "prompts", [{"id": "asked-1", "prompt": "prompt 1", "answer": "7"}]),
    ):
        contents = [row.model_dump() if isinstance(row, Preference) else row for row in own]
        envelopes = [{"file": "f", "line": line, "row": row} for line, row in enumerate(contents)]
        write_rows(tmp_path / "rows" / f"{name}.jsonl", envelopes)
        (tmp_path / "cards").mkdir(exist_ok=True)
        (tmp_path / "cards" / f"{name}.json").write_text(json.dumps({"kind": "local", "type": kind}))
    params = PrepareParams(prompt_words=1, min_words=2, max_words=9, near_duplicate_threshold=1.0, validation_share=0,
                           test_share=0, gold_share=0, max_quarantine_share=0)  # fmt: skip
    prepare(
        params,
        0,
        Artifacts(base_model=write_tokenizer(tmp_path / "base_model"), collect=tmp_path, out=tmp_path / "out"),
    )
    kept = (tmp_path / "out" / "preferences" / "train.jsonl").read_text().splitlines()
    assert {json.loads(line)["id"] for line in kept} == {row.id for row in rows}
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["dropped"]["duplicate"] == 1
    prompts = [json.loads(line) for line in (tmp_path / "out" / "prompts" / "train.jsonl").read_text().splitlines()]
    assert {row["prompt"]: row["answer"] for row in prompts} == {"prompt 1": "7", "prompt 2": None}
