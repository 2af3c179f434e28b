"""An append-only copy of an SQLite labelling database, and how the database is rebuilt from it.

The copy is JSON Lines beside the database, `labels.db.jsonl`: a row of a table a line, `{"table": …, "row": {…}}`. It
is on the disk before an answer counts as saved. Passwords are in it as hashes, so it is readable by its owner alone.
"""

import fcntl
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any, TypeAlias

from sqlalchemy import Connection, Row, Select, Table, select
from sqlalchemy.exc import IntegrityError

from tasks.core.errors import ConfigError, DataError, SourceError
from tasks.labelling import database as db

__all__ = ["LabelCopy", "Restored", "copy_path", "restore"]

TABLES = {table.name: table for table in db.metadata.sorted_tables}  # those that others refer to come first
VERSIONS = {"labellers": "password_hash", "events": "token"}
"""Table → the column that, beside the key, makes a row another one; others never change."""

Known: TypeAlias = dict[str, dict[Any, Any]]
"""Table → key → version of the rows in a copy."""


@dataclass(frozen=True)
class Restored:
    """Rows of each table in the new database, lines of the copy that could not be read, and where the old one lies."""

    rows: dict[str, int]
    unreadable: int
    old: Path | None


def copy_path(file: Path) -> Path:
    """Return where the copy of this database is."""
    return file.with_name(f"{file.name}.jsonl")


class LabelCopy:
    """The copy of an open database. The database's lock on writers is the copy's lock, too."""

    def __init__(self, file: Path) -> None:
        """Open it for as long as the database is open.

        Raises:
            SourceError: the database is being restored.
            DataError: the copy holds labels, and the database is missing.
        """
        self._path, self._known, self._end = copy_path(file), _nothing_known(), 0
        self._torn, self._unsynced = False, True
        self._file = _open_copy(self._path, fcntl.LOCK_SH, "it is being restored: wait for its end")
        self._read_new()
        if not file.exists() and any(self._known.values()):
            self.close()
            raise DataError(
                f"{file} is missing, and its copy holds {len(self._known['events'])} answers: `rlhf label restore` "
                f"rebuilds it; to begin anew, move {self._path} away"
            )

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def compare(self, connection: Connection) -> None:
        """Add all that is missing in the copy.

        Raises:
            DataError: the copy holds what the database lacks: an older database, or another one, took its place.
        """
        for name in ("questions", "events"):
            keys = self._known[name].items() - {_identity(TABLES[name], row) for row in _all(connection, name)}
            if keys:
                raise DataError(
                    f"{connection.engine.url.database} lacks {len(keys)} {name} that its copy {self._path} holds, so "
                    "it is an older database or another one: `rlhf label restore` rebuilds it, and keeps this one"
                )
        self.catch_up(connection, everything=True)
        folder = os.open(self._path.parent, os.O_RDONLY)
        os.fsync(folder)  # that the two files are there is on the disk, too
        os.close(folder)

    def catch_up(self, connection: Connection, *, everything: bool = False) -> None:
        """Write what is committed and not in the copy yet, and force it to the disk; the connection is a writer's."""
        self._read_new()
        lines = [_line(table, row) for table in TABLES.values() for row in self._missing(connection, table, everything)]
        if lines or self._unsynced:
            self._unsynced = True  # until the disk has it
            _write_all(self._file.fileno(), (b"\n" if self._torn else b"") + b"".join(lines))
            os.fsync(self._file.fileno())
            self._read_new()
            self._unsynced = False

    def _missing(self, connection: Connection, table: Table, everything: bool) -> list[Row[Any]]:
        known = self._known[table.name]
        if not everything and table is not db.labellers and db.count_rows(connection, select(table)) == len(known):
            return []
        after = max(known, default=0) if table is db.events and not everything else None
        rows = _all(connection, table.name, after)
        return [row for row in rows if _identity(table, row) not in known.items()]

    def _read_new(self) -> None:
        """Learn what is in the file since the last time, by this program or another one."""
        file = self._file.fileno()
        content = os.pread(file, os.fstat(file).st_size - self._end, self._end)
        self._end += len(content)
        for line in content.splitlines(keepends=True):
            _read_line(line, self._known)
            self._torn, self._unsynced = not line.endswith(b"\n"), True


def restore(url: str) -> Restored:
    """Rebuild the database from its copy, whole or not at all, and move the old one aside.

    Raises:
        ConfigError: it is no SQLite database in a file.
        SourceError: another program has it open.
        DataError: there is no copy, or it contradicts itself.
    """
    file = db.database_file(url)
    if file is None:
        raise ConfigError("only an SQLite database has a copy; PostgreSQL has backups of its own")
    if not (path := copy_path(file)).exists():
        raise DataError(f"there is no copy {path} to rebuild the database from")
    lock = _open_copy(path, fcntl.LOCK_EX, "another program has it open: end `rlhf label` first")
    try:
        with db.explained(str(file)):
            return _rebuild(file, path.read_bytes().split(b"\n"))
    except IntegrityError as error:
        raise DataError(f"{path} contradicts itself ({error.orig}): mend the line, or move it away") from None
    finally:
        lock.close()


def _rebuild(file: Path, lines: Sequence[bytes]) -> Restored:
    rows: dict[str, dict[Any, dict[str, Any]]] = defaultdict(dict)
    known, unreadable = _nothing_known(), 0
    for line in filter(bytes.strip, lines):
        if found := _read_line(line, known):
            table, row = found
            rows[table.name][row[_key(table)]] = row
        else:
            unreadable += 1
    if not rows:
        raise DataError(f"{copy_path(file)} holds nothing that can be read")
    for event in rows["events"].values():
        nobody = {"name": event["labeller"], "password_hash": None, "created_at": event["created_at"]}
        rows["labellers"].setdefault(event["labeller"], nobody)
    draft = file.with_name(f"{file.name}.new")
    draft.unlink(missing_ok=True)
    db.create_file(draft, {table: list(rows[name].values()) for name, table in TABLES.items()})
    old = _move_aside(file)
    draft.rename(file)
    return Restored({name: len(rows[name]) for name in TABLES}, unreadable, old)


def _move_aside(file: Path) -> Path | None:
    """Move the old database and its parts away; return its new place."""
    place = next(
        place for number in range(1, 10**6) if not (place := file.with_name(f"{file.name}.old-{number}")).exists()
    )
    moved = file.exists()
    for part in (file, *db.file_parts(file)):
        if part.exists():
            part.rename(place.with_name(place.name + part.name.removeprefix(file.name)))
    return place if moved else None


def _open_copy(path: Path, lock: int, locked: str) -> FileIO:
    """Open and lock the file, which is made if it is missing."""
    with db.explained(str(path)):
        file = FileIO(path, "a+", opener=lambda name, flags: os.open(name, flags, 0o600))
        try:
            fcntl.flock(file, lock | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise SourceError(f"{path.with_suffix('')}: {locked}") from None
    return file


def _write_all(file: int, content: bytes) -> None:
    while content:
        content = content[os.write(file, content) :]


def _nothing_known() -> Known:
    return {name: {} for name in TABLES}


def _key(table: Table) -> str:
    return next(iter(table.primary_key)).name


def _identity(table: Table, row: Row[Any]) -> tuple[Any, Any]:
    return getattr(row, _key(table)), getattr(row, VERSIONS.get(table.name, _key(table)))


def _all(connection: Connection, name: str, after: int | None = None) -> Iterator[Row[Any]]:
    key = TABLES[name].c[_key(TABLES[name])]
    rows: Select[Any] = select(TABLES[name]).order_by(key)
    yield from connection.execute(rows if after is None else rows.where(key > after))


def _line(table: Table, row: Row[Any]) -> bytes:
    content = row._asdict() | {"created_at": row.created_at.replace(tzinfo=UTC).isoformat()}
    return json.dumps({"table": table.name, "row": content}, ensure_ascii=False).encode() + b"\n"


def _read_line(line: bytes, known: Known) -> tuple[Table, dict[str, Any]] | None:
    """Return a row and its table, None for a line that is no row or an answer to a question that is not there."""
    try:
        content = json.loads(line)
        table, row = TABLES[content["table"]], dict(content["row"])
        row["created_at"] = datetime.fromisoformat(row["created_at"])
        key, version = row[_key(table)], row[VERSIONS.get(table.name, _key(table))]
        readable = row.keys() <= set(table.c.keys()) and (
            table is not db.events or row["question_id"] in known["questions"]
        )
        if readable:
            known[table.name][key] = version
            return table, row
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
        pass
    return None
