"""Tables of the labelling database, and its engine: SQLite in the project by default, PostgreSQL by URL.

Events are only ever added: the current label of a labeller is their last event on the question.
"""

import contextlib
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Column, Connection, Engine, Integer, Row, Select, String, Table, Text
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from tasks.core.errors import ConfigError, DataError, RLHFError, SourceError
from tasks.core.paths import state_dir
from tasks.labelling.labels import MAX_LENGTHS, MAX_NAME_LENGTH, Label, Question

__all__ = [
    "EVENT", "IS_CURRENT", "LAST_IDS", "QUESTION", "UnavailableError", "connect", "count_rows", "create_file",
    "database_file", "database_url", "events", "explained", "find_event", "guidelines", "in_order", "labellers",
    "metadata", "questions", "redact_url", "to_label", "to_question",
]  # fmt: skip

BUSY_SECONDS = 30
"""How long a writer waits for another one's transaction in SQLite."""

MIGRATION_LOCK = 0x524C4846
"""Of PostgreSQL's advisory locks: two programs that open a new database at once migrate it one after the other."""

FIRST_TABLES = {"questions", "labellers", "events"}
"""Those that every version has."""

DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
REBUILD = "end `rlhf label`, then `rlhf label restore` rebuilds it from its copy"

metadata = sa.MetaData()


class UnavailableError(SourceError):
    """The database cannot be read or written just now; `reason` is what a labeller may be told."""

    def __init__(self, address: str, reason: str, cure: str) -> None:
        super().__init__(f"cannot use the labelling database {address}: {reason}; {cure}")
        self.reason = reason


def _created_at() -> Column[datetime]:
    return Column("created_at", sa.DateTime(timezone=True), nullable=False, default=lambda: datetime.now(UTC))


questions = Table(
    "questions",
    metadata,
    Column("id", String(64), primary_key=True),
    *(Column(name, Text, nullable=False) for name in ("prompt", "response_a", "response_b")),
    *(Column(name, String(length), nullable=False) for name, length in MAX_LENGTHS.items()),
    Column("gold", String(8)),
    Column("priority", sa.Float, nullable=False),
    Column("labels_wanted", Integer, nullable=False),
    _created_at(),
)
"""The fields of `labels.Question`."""

labellers = Table(
    "labellers",
    metadata,
    Column("name", String(MAX_NAME_LENGTH), primary_key=True, doc="For a model: `model:` and its name."),
    Column("password_hash", String(256), doc="Null for a model, and nobody signs in as one."),
    _created_at(),
)

guidelines = Table(
    "guidelines",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("text", Text, nullable=False),
    _created_at(),
)
"""What was ever shown beside the questions."""

events = Table(
    "events",
    metadata,
    Column("event_id", Integer, primary_key=True, autoincrement=True),
    Column("token", String(36), nullable=False, unique=True, doc="Made by the page: sent twice, it counts once."),
    Column("question_id", sa.ForeignKey("questions.id"), nullable=False, index=True),
    Column("labeller", sa.ForeignKey("labellers.name"), nullable=False, index=True),
    Column("previous_event", Integer, nullable=False, doc="This labeller's last event on the question; 0: none."),
    Column("kind", String(8), nullable=False),
    Column("choice", String(8)),
    *(Column(name, Integer) for name in ("strength", "rating_a", "rating_b")),
    Column("comment", Text),
    Column("swapped", sa.Boolean, nullable=False, default=False),
    Column("seconds", sa.Float),
    _created_at(),
    Column("guidelines", String(64), doc="sha256 of those that were shown; null: none were."),
    sa.UniqueConstraint("question_id", "labeller", "previous_event"),
    sa.CheckConstraint("kind in ('label', 'undo')"),
    sa.CheckConstraint("(kind = 'label') = (choice is not null)"),
)
"""The fields of `labels.Label`, or their undoing; `previous_event` makes a second vote on the same state impossible."""

TRIGGERS = (
    ("sqlite", "CREATE TRIGGER events_no_update BEFORE UPDATE ON events "
               "BEGIN SELECT RAISE(ABORT, 'events are only ever added'); END"),
    ("sqlite", "CREATE TRIGGER events_no_delete BEFORE DELETE ON events "
               "BEGIN SELECT RAISE(ABORT, 'events are only ever added'); END"),
    ("postgresql", "CREATE FUNCTION events_only_added() RETURNS trigger LANGUAGE plpgsql AS "
                   "$$ BEGIN RAISE EXCEPTION 'events are only ever added'; END $$"),
    ("postgresql", "CREATE TRIGGER events_only_added BEFORE UPDATE OR DELETE OR TRUNCATE ON events "
                   "FOR EACH STATEMENT EXECUTE FUNCTION events_only_added()"),
)  # fmt: skip
"""By which the database itself refuses to change or delete an event."""

for _dialect, _statement in TRIGGERS:
    _ddl = sa.DDL(_statement)  # type: ignore[no-untyped-call]
    sa.event.listen(events, "after_create", _ddl.execute_if(dialect=_dialect))

EVENT, QUESTION = events.c, questions.c

_each = events.alias()
LAST_IDS = sa.select(sa.func.max(_each.c.event_id)).group_by(_each.c.question_id, _each.c.labeller)
"""Of each labeller's last event on each question."""

IS_CURRENT = sa.and_(EVENT.kind == "label", EVENT.event_id.in_(LAST_IDS))
"""Of an event: it is a label, and this labeller's last event on this question."""


def database_url(url: str | None) -> str:
    """Return the URL that was asked for, else that of `.rlhf/labels.db` in this project."""
    if url:
        return url
    state_dir().mkdir(exist_ok=True)
    return f"sqlite:///{state_dir() / 'labels.db'}"


def redact_url(url: str | URL) -> str:
    """Return the URL without its password, wherever that stands."""
    parsed = sa.make_url(url)
    return parsed.difference_update_query(["password", "passfile"]).render_as_string(hide_password=True)


def database_file(url: str) -> Path | None:
    """Return the file of an SQLite database; None for one in memory, and for PostgreSQL."""
    parsed = _parse_url(url)
    name = parsed.database or ""
    in_file = parsed.get_backend_name() == "sqlite" and name not in ("", ":memory:") and not name.startswith("file:")
    return Path(name) if in_file else None


def connect(url: str) -> Engine:
    """Return an engine for the database, after creating or migrating its tables.

    Raises:
        ConfigError: no database URL, or of a kind that is not supported.
        SourceError: the database does not answer, or is damaged.
        DataError: it is no labelling database, or was written by a newer version of this code.
    """
    file, engine = database_file(url), _engine(url)
    try:
        with explained(redact_url(url)):
            if file and not file.exists():
                create_file(file)
            if file and file.stat().st_size == 0:
                raise DataError(f"{file} has 0 bytes, and a labelling database never has: it was emptied; {REBUILD}")
            plain = sa.create_engine(engine.url) if file else engine  # what sets nothing, in case it is not ours
            with plain.connect() as connection:
                _check_integrity(connection)
                _check_ours(connection)
            if file:
                plain.dispose()
            with engine.execution_options(writes=True).begin() as connection:
                migrate(connection)
    except RLHFError:
        engine.dispose()
        raise
    return engine


def create_file(file: Path, rows: Mapping[Table, Sequence[Mapping[str, Any]]] = MappingProxyType({})) -> None:
    """Create an SQLite database with these rows, whole or not at all, so that half a one is never taken for new.

    Raises:
        DataError: parts of another database lie there, which SQLite would take for this one's.
    """
    if parts := [part for part in file_parts(file) if part.exists()]:
        raise DataError(f"{parts[0]} is there without its database {file}: put that back, or move the part away")
    draft = file.with_name(f"{file.name}.{secrets.token_hex(4)}")
    engine = _engine(f"sqlite:///{draft}")
    try:
        with engine.execution_options(writes=True).begin() as connection:
            migrate(connection)
            for table, content in rows.items():
                if content:
                    connection.execute(sa.insert(table), content)
        engine.dispose()  # SQLite's last connection leaves one whole file
        with contextlib.suppress(FileExistsError):  # another program was faster
            file.hardlink_to(draft)
    finally:
        engine.dispose()
        for part in (draft, *file_parts(draft)):
            part.unlink(missing_ok=True)


def file_parts(file: Path) -> list[Path]:
    """Return where SQLite keeps what is not in the database's own file yet."""
    return [file.with_name(file.name + suffix) for suffix in ("-wal", "-shm", "-journal")]


@contextlib.contextmanager
def explained(address: str) -> Iterator[None]:
    """Turn a driver's error into an UnavailableError; that a row is there already is for the caller to judge."""
    try:
        yield
    except IntegrityError:
        raise
    except (DBAPIError, PoolTimeoutError, OSError, ValueError) as error:
        orig = getattr(error, "orig", None) or error
        reason = getattr(orig, "strerror", None) or str(orig).strip() or type(orig).__name__
        undecodable = isinstance(error, ValueError) or "decode to UTF-8" in reason
        if undecodable or getattr(orig, "sqlite_errorname", "").startswith(DAMAGED):
            raise UnavailableError(address, f"it is damaged or no database ({reason})", REBUILD) from None
        cure = "see that it runs, that its disk has room and may be written, and check --database"
        raise UnavailableError(address, reason, cure) from None


def _check_integrity(connection: Connection) -> None:
    if connection.dialect.name == "sqlite":
        found = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar()
        if found != "ok":
            reason = " ".join(str(found).split())
            raise UnavailableError(redact_url(connection.engine.url), f"it is damaged ({reason})", REBUILD)


def _check_ours(connection: Connection) -> None:
    """Raise a DataError where other tables are there and ours are not, or an SQLite file has none at all."""
    names = set(sa.inspect(connection).get_table_names())
    is_new = not names and database_file(str(connection.engine.url)) is None
    if not (is_new or names >= FIRST_TABLES):
        raise DataError(
            f"{redact_url(connection.engine.url)} is no labelling database: its tables are "
            f"{', '.join(sorted(names)) or 'none'}; name another one with --database"
        )


def migrations() -> ScriptDirectory:
    """Return the revisions, which are within this package, so that no file of the user's is needed."""
    folder = str(Path(__file__).parent / "migrations")
    return ScriptDirectory(folder, version_locations=[folder])


def migrate(connection: Connection) -> None:
    """Create the tables or bring them to the newest revision, within the transaction of this connection.

    Raises:
        DataError: the database was written by a newer version of this code.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("select pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
    scripts = migrations()
    known = {script.revision for script in scripts.walk_revisions()}
    context = MigrationContext.configure(connection)
    found = set(context.get_current_heads())
    if unknown := found - known:
        address = redact_url(connection.engine.url)
        raise DataError(
            f"the labelling database {address} is at revision {', '.join(sorted(unknown))}, which this code does not "
            "know: a newer version wrote it. Update the project, or name another with --database"
        )
    if not found:
        metadata.create_all(connection, checkfirst=False)
        context.stamp(scripts, "head")
        return

    def upgrade(current: Any, _: MigrationContext) -> Any:
        return scripts._upgrade_revs("head", current)

    with EnvironmentContext(Config(), scripts, fn=upgrade, destination_rev="head") as environment:
        environment.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
        environment.run_migrations()


def to_question(row: Row[Any]) -> Question:
    """Return the question in a row of its table."""
    return Question(*(getattr(row, name) for name in Question.__dataclass_fields__))


def to_label(row: Row[Any]) -> Label:
    """Return the label in a row of the events' table."""
    return Label(*(getattr(row, name) for name in Label.__dataclass_fields__))


def in_order(statement: Select[Any]) -> Select[Any]:
    """Order questions as they are shown: by priority, then as they were added."""
    return statement.order_by(QUESTION.priority.desc(), QUESTION.created_at, QUESTION.id)


def find_event(connection: Connection, **values: object) -> Row[Any] | None:
    """Return the last event with these values."""
    found = sa.select(events).filter_by(**values).order_by(EVENT.event_id.desc()).limit(1)
    return connection.execute(found).first()


def count_rows(connection: Connection, statement: Select[Any]) -> int:
    """Count the rows that the statement would give."""
    return connection.scalar(sa.select(sa.func.count()).select_from(statement.order_by(None).subquery())) or 0


def _parse_url(url: str) -> URL:
    try:
        return sa.make_url(url)
    except ArgumentError:
        raise ConfigError("--database is no database URL; write postgresql://user:password@host/name") from None


def _engine(url: str) -> Engine:
    parsed = _parse_url(url)
    kind = parsed.get_backend_name()
    if kind not in ("sqlite", "postgresql"):
        raise ConfigError(f"--database names a database of kind {kind!r}; sqlite and postgresql are supported")
    if kind == "postgresql":
        try:
            return sa.create_engine(parsed, pool_pre_ping=True)
        except ModuleNotFoundError as error:
            raise ConfigError(f"PostgreSQL needs {error.name}: pip install psycopg2-binary") from None
    engine = sa.create_engine(parsed, connect_args={"timeout": BUSY_SECONDS})
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    """Put a commit on the disk before it is acknowledged; readers and a writer do not block each other."""
    connection.isolation_level = None  # the driver begins transactions late, and not before every statement
    with contextlib.closing(connection.cursor()) as cursor:
        for pragma in ("journal_mode=WAL", "foreign_keys=ON", "synchronous=FULL"):
            cursor.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    """Take a writer's lock at once: one that has read before it writes could not wait for another one."""
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
