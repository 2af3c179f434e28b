"""Rows from a file on this machine: JSON Lines, CSV or Parquet; the first two also compressed with gzip."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
from pyarrow import parquet

from tasks.core.errors import DataError, SourceError
from tasks.core.paths import project_root
from tasks.data.pypi import sha256_of

if TYPE_CHECKING:
    from tasks.config.data import SourceParams

__all__ = ["read_local"]


def read_local(source: SourceParams, seed: int) -> tuple[Iterable[tuple[str, int, object]], dict[str, object]]:
    """The file's rows as (file, line, content); a line that is no JSON becomes the string `reason\\nline`.

    A relative path starts at the project's root. Parquet has no lines: its rows are counted from 1.

    Raises:
        SourceError: the file is missing, or its checksum differs.
        DataError: its ending is unknown, it cannot be read, or its columns are not there.
    """
    path = project_root() / Path(source.id).expanduser()
    if not path.is_file():
        raise SourceError(
            f"source {source.name!r}: there is no file {path}; collect.sources[].id must name an existing one"
        )
    digest = sha256_of(path)
    if source.sha256 and digest != source.sha256:
        raise SourceError(
            f"source {source.name!r}: {source.id} has SHA-256 {digest}, params.yaml says {source.sha256}; "
            "set that if the change of the file is wanted"
        )
    ending = path.name.removesuffix(".gz").rpartition(".")[2]
    if ending not in _FORMATS:
        raise DataError(f"source {source.name!r}: {source.id} should end in {', '.join(f'.{e}' for e in _FORMATS)}")
    # As the user wrote it; of a path outside the project the name alone, which is the same on every machine.
    file = path.name if Path(source.id).expanduser().is_absolute() else source.id
    rows = ((file, line, content) for line, content in _FORMATS[ending](path))
    return rows, {"source": f"local file {file}", "file": file, "sha256": digest}


def _json_lines(path: Path) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(io.BytesIO(_read_bytes(path)), start=1):
        if line.strip():
            yield number, _parsed(line.rstrip(b"\r\n"))


def _parsed(line: bytes) -> object:
    try:
        content: object = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return f"not UTF-8: {error.reason} at byte {error.start + 1}\n{line.decode('utf-8', errors='replace')}"
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at column {error.colno}\n{line.decode('utf-8')}"
    return f"not an object but a string\n{line.decode('utf-8-sig')}" if isinstance(content, str) else content


def _csv(path: Path) -> Iterator[tuple[int, object]]:
    try:
        text = _read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start + 1}); save it as UTF-8") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    last = 1
    try:
        for row in reader:
            start, last = last + 1, reader.line_num
            yield start, _checked_row(row, reader.fieldnames or ())
    except csv.Error as error:
        raise DataError(f"{path}:{last + 1}: not CSV ({error}); quote the cell, or save it as JSON Lines") from error


def _checked_row(row: dict[Any, Any], names: Iterable[str]) -> object:
    """A CSV row, or an error if it has too many or too few cells, which may mean bad quoting."""
    if None in row or any(row[name] is None for name in names):
        cells = [cell for value in row.values() for cell in (value if isinstance(value, list) else [value])]
        got = sum(cell is not None for cell in cells)
        return f"{got} cells under {len(list(names))} column names\n{json.dumps(cells, ensure_ascii=False)}"
    return row


def _parquet(path: Path) -> Iterator[tuple[int, object]]:
    try:
        yield from enumerate(parquet.read_table(path).to_pylist(), start=1)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}; write it again") from error


def _read_bytes(path: Path) -> bytes:
    content = path.read_bytes()
    try:
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}); copy it again") from error


_FORMATS: dict[str, Callable[[Path], Iterator[tuple[int, object]]]] = {
    "jsonl": _json_lines,
    "csv": _csv,
    "parquet": _parquet,
}
