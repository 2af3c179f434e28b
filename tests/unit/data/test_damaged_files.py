"""Files that are damaged at random: a row is read, quarantined with its reason, or the file is one DataError."""

import gzip
import json
import math
import random
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tasks.config.data import SourceParams
from tasks.core.errors import DataError
from tasks.core.rows import write_json, write_rows
from tasks.data.cleaning import clean
from tasks.data.sources import collect_source
from tasks.labelling.formats import FORMATS, load
from tasks.labelling.labels import Question, question_id
from tests.support.labels import labels_of, make_question

PAIRS = [
    {"id": f"p{n}", "prompt": f"What is {n} + 1?", "chosen": f"{n + 1}é", "rejected": '"no", \\u00fc', "margin": n / 7}
    for n in range(6)
]
SPLICES = (
    b"\xff\xfe",
    b"\x00",
    b"\\ud800",
    b"9" * 4301,
    b"[" * 3000,
    b"NaN",
    b"Infinity",
    b"null",
    b"{",
    b'"',
    b",",
    b"\n",
    b"1e999",
)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """One to three bytes flipped, a piece cut out, or a piece put in."""
    damage = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place, kind = rng.randrange(len(damage) + 1), rng.randrange(3)
        if kind == 0 and place < len(damage):
            damage[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del damage[place : place + rng.randint(1, 40)]
        else:
            damage[place:place] = rng.choice(SPLICES)
    return bytes(damage)


def as_json_lines() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in PAIRS).encode()


def as_csv() -> bytes:
    cells = [[str(value).replace('"', '""') for value in row.values()] for row in PAIRS]
    return "\n".join([",".join(PAIRS[0]), *(",".join(f'"{cell}"' for cell in row) for row in cells), ""]).encode()


def as_parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(PAIRS), sink, compression="none")
    return bytes(sink.getvalue())


FILES: dict[str, Callable[[], bytes]] = {
    "a.jsonl": as_json_lines,
    "a.jsonl.gz": lambda: gzip.compress(as_json_lines(), mtime=0),
    "a.csv": as_csv,
    "a.parquet": as_parquet,
}


def read_and_clean(root: Path, name: str, row_type: str = "preferences") -> tuple[list[Any], list[dict[str, Any]]]:
    """Valid rows and quarantine, by way of the files that stage collect writes."""
    collected = collect_source(SourceParams(name="a", kind="local", id=name, row_type=row_type), 0)
    write_rows(root / "collect" / "rows" / "a.jsonl", collected.rows)
    write_json(root / "collect" / "cards" / "a.json", {"kind": "local", "type": row_type})
    cleaned = clean(root / "collect")
    assert len(cleaned.rows) + len(cleaned.quarantine) == len(collected.rows)
    return cleaned.rows, cleaned.quarantine


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_source_is_read_quarantined_or_one_data_error(root: Path, name: str) -> None:
    rng, content = random.Random(name), FILES[name]()
    outcomes = Counter[str]()
    for _ in range(500):
        (root / name).write_bytes(damaged(content, rng))
        try:
            _, quarantine = read_and_clean(root, name)
        except DataError as error:
            outcomes["refused" if name in str(error) else "unnamed"] += 1
            continue
        assert all(row["reason"] and row["line"] >= 1 and row["file"] == name for row in quarantine)
        outcomes["quarantined" if quarantine else "read"] += 1
    assert outcomes["read"], "the damage is too much to show anything"
    assert outcomes["refused"] + outcomes["quarantined"]
    assert not outcomes["unnamed"]


def question_of(prompt: str) -> Question:
    texts = {"prompt": prompt, "response_a": "one é", "response_b": "two"}
    return make_question(question_id(*texts.values()), **texts)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_file_of_labels_is_read_or_one_data_error(tmp_path: Path, kind: Any) -> None:
    rng, to_record = random.Random(kind), FORMATS[kind][0]
    questions = [question_of(f"What is {n}?") for n in range(4)]
    records = [to_record(question, labels_of(question, ann="a 2", bo="tie")) for question in questions]
    content = ("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n").encode()
    path = tmp_path / "labels.json"
    outcomes = Counter[str]()
    for _ in range(300):
        path.write_bytes(damaged(content, rng))
        try:
            load(path, kind)
        except DataError as error:
            outcomes["refused" if str(path) in str(error) else "unnamed"] += 1
            continue
        outcomes["read"] += 1
    assert set(outcomes) == {"refused", "read"}


def test_what_json_and_utf8_cannot_hold_is_quarantined_and_decimals_are_numbers(root: Path) -> None:
    values = [[Decimal("1.50"), Decimal(2)], [b"\xff"], [1e308, 1e308], None]
    rows = [{"id": None, "text": f"text {n}", "ratings": value} for n, value in enumerate(values)]
    with (root / "a.jsonl").open("w") as file:
        file.write('{"text": "a", "ratings": [1.5, 2]}\n{"text": "\\ud800", "ratings": [1]}\n')
        file.write('{"text": "c", "ratings": [1e308, 1e308]}\n{"text": "d", "ratings": [' + "9" * 4301 + "]}\n")
        file.write('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n" + '{"id": null, "text": "f", "ratings": [3]}\n')
    kept, quarantine = read_and_clean(root, "a.jsonl", "ratings")
    assert [row.id for row in kept] == ["a-1", "a-6"]
    assert [row["line"] for row in quarantine] == [2, 3, 4, 5]
    for reason, part in zip(
        quarantine, ("surrogates", "less than or equal to 1000000", "4300 digits", "recursion"), strict=True
    ):
        assert part in reason["reason"]
    table = pyarrow.table(
        {
            "text": [row["text"] for row in rows[:1]] + ["x"],
            "ratings": pyarrow.array([values[0], [Decimal(3)]], pyarrow.list_(pyarrow.decimal128(5, 2))),
            "id": pyarrow.array([b"\xff", b"ok"], pyarrow.binary()),
        }
    )
    parquet.write_table(table.drop(["id"]), root / "a.parquet")
    assert [row.ratings for row in read_and_clean(root, "a.parquet", "ratings")[0]] == [(1.5, 2.0), (3.0,)]
    parquet.write_table(table, root / "a.parquet")
    _, quarantine = read_and_clean(root, "a.parquet", "ratings")
    assert [row["reason"] for row in quarantine] == ["id: a value of type bytes; texts and numbers can be read"] * 2


def test_a_margin_that_is_infinite_is_quarantined_and_nan_is_none(root: Path) -> None:
    lines = [
        json.dumps(PAIRS[0] | {"id": str(n), "margin": value}) for n, value in enumerate((1.0, math.nan, math.inf))
    ]
    (root / "a.jsonl").write_text("\n".join(lines))
    kept, quarantine = read_and_clean(root, "a.jsonl")
    assert [row.margin for row in kept] == [1.0, None]
    assert [(row["line"], row["reason"].partition(" (")[0]) for row in quarantine] == [
        (3, "margin: Input should be a finite number")
    ]
