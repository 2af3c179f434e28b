"""Reading JSON Lines, CSV and Parquet: each row with its line, each broken line kept as it was."""

from __future__ import annotations

import gzip
from pathlib import Path

import pandas
import pytest

from tasks.config.data import SourceParams
from tasks.core.errors import DataError, SourceError
from tasks.data.sources import read_local


def lines(name: str, **more: str) -> list[tuple[str, int, object]]:
    source = SourceParams(name="mine", kind="local", row_type="prompts", id=name, **more)
    return list(read_local(source, 0)[0])


def test_json_lines_keep_their_numbers_and_broken_ones_their_text(root: Path) -> None:
    (root / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"prompt": "one"}\n\n{"prompt": \r\n{"prompt": "caf\xe9"}\n[1]\n"text"\n'
    )
    assert lines("a.jsonl") == [
        ("a.jsonl", 1, {"prompt": "one"}),
        ("a.jsonl", 3, 'not JSON: Expecting value at column 12\n{"prompt": '),
        ("a.jsonl", 4, 'not UTF-8: invalid continuation byte at byte 16\n{"prompt": "caf\ufffd"}'),
        ("a.jsonl", 5, [1]),
        ("a.jsonl", 6, 'not an object but a string\n"text"'),
    ]


def test_a_gzipped_file_reads_like_the_plain_one(root: Path) -> None:
    (root / "a.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "one"}\n'))
    assert lines("a.jsonl.gz") == [("a.jsonl.gz", 1, {"prompt": "one"})]
    (root / "a.jsonl.gz").write_bytes(b"plain")
    with pytest.raises(DataError, match=r"a\.jsonl\.gz is not a whole gzip file"):
        lines("a.jsonl.gz")


def test_csv_rows_know_the_line_they_start_on(root: Path) -> None:
    (root / "a.csv").write_text('id,prompt\n1,"two\nlines"\n2,short\n3\n4,a,b\n', encoding="utf-8")
    assert lines("a.csv") == [
        ("a.csv", 2, {"id": "1", "prompt": "two\nlines"}),
        ("a.csv", 4, {"id": "2", "prompt": "short"}),
        ("a.csv", 5, '1 cells under 2 column names\n["3", null]'),
        ("a.csv", 6, '3 cells under 2 column names\n["4", "a", "b"]'),
    ]


def test_csv_with_an_open_quote_is_refused(root: Path) -> None:
    (root / "a.csv").write_text('id,prompt\n1,"never closed\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.csv:2: not CSV"):
        lines("a.csv")


def test_parquet_rows_are_counted_from_one(root: Path) -> None:
    pandas.DataFrame({"text": ["a", "b"], "ratings": [[1.0, 2.0], [3.0]]}).to_parquet(root / "a.parquet")
    assert lines("a.parquet") == [
        ("a.parquet", 1, {"text": "a", "ratings": [1.0, 2.0]}),
        ("a.parquet", 2, {"text": "b", "ratings": [3.0]}),
    ]
    (root / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as Parquet"):
        lines("a.parquet")


def test_a_missing_file_another_checksum_and_an_unknown_ending_are_named(root: Path) -> None:
    with pytest.raises(SourceError, match=r"source 'mine': there is no file .*/none\.jsonl"):
        lines("none.jsonl")
    (root / "a.jsonl").write_text('{"prompt": "one"}\n')
    with pytest.raises(SourceError, match=r"a\.jsonl has SHA-256 [0-9a-f]{64}, params.yaml says 00"):
        lines("a.jsonl", sha256="00")
    (root / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"a\.txt should end in \.jsonl, \.csv, \.parquet"):
        lines("a.txt")
