"""Tables of the labelling database, and its engine: SQLite in the project by default, PostgreSQL by URL.

Events are only ever added: the current label of a labeller is their last event on the question.
"""

import contextlib
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Column, Connection, Engine, Integer, Row, Select, String, Table, Text
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError

from tasks.core.errors import ConfigError, DataError, SourceError
from tasks.core.paths import state_dir
from tasks.labelling.labels import MAX_LENGTHS, MAX_NAME_LENGTH, Label, Question

__all__ = [
    "EVENT", "IS_CURRENT", "QUESTION", "connect", "count_rows", "database_url", "events", "find_event", "in_order",
    "labellers", "questions", "redact_url", "to_label", "to_question",
]  # fmt: skip

BUSY_SECONDS = 30
"""How long a writer waits for another one's transaction in SQLite."""

MIGRATION_LOCK = 0x524C4846
"""Of PostgreSQL's advisory locks: two programs that open a new database at once migrate it one after the other."""

metadata = sa.MetaData()


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
    sa.UniqueConstraint("question_id", "labeller", "previous_event"),
    sa.CheckConstraint("kind in ('label', 'undo')"),
    sa.CheckConstraint("(kind = 'label') = (choice is not null)"),
)
"""The fields of `labels.Label`, or their undoing; `previous_event` makes a second vote on the same state impossible."""

EVENT, QUESTION = events.c, questions.c

_each = events.alias()
_last_ids = sa.select(sa.func.max(_each.c.event_id)).group_by(_each.c.question_id, _each.c.labeller)

IS_CURRENT = sa.and_(EVENT.kind == "label", EVENT.event_id.in_(_last_ids))
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


def connect(url: str) -> Engine:
    """Return an engine for the database, after creating or migrating its tables.

    Raises:
        ConfigError: no database URL, or of a kind that is not supported.
        SourceError: the database does not answer.
        DataError: the database was written by a newer version of this code.
    """
    engine = _engine(url)
    try:
        with engine.execution_options(writes=True).begin() as connection:
            migrate(connection)
    except (DBAPIError, DataError) as error:
        engine.dispose()
        if isinstance(error, DataError):
            raise
        reason = str(error.orig).strip()
        raise SourceError(
            f"cannot open the labelling database {redact_url(url)}: {reason}; see that it runs, and check --database"
        ) from None
    return engine


def migrations() -> ScriptDirectory:
    """Return the revisions, which are within this package, so that no file of the user's is needed."""
    folder = str(Path(__file__).parent / "migrations")
    return ScriptDirectory(folder, version_locations=[folder])


def migrate(connection: Connection, revision: str = "head") -> None:
    """Bring the tables to a revision, within the transaction of this connection.

    Raises:
        DataError: the database was written by a newer version of this code.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("select pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
    scripts = migrations()
    known = {script.revision for script in scripts.walk_revisions()}
    unknown = set(MigrationContext.configure(connection).get_current_heads()) - known
    if unknown:
        raise DataError(
            f"the labelling database {redact_url(connection.engine.url)} is at revision {', '.join(sorted(unknown))}, "
            "which this code does not know: a newer version wrote it. Update the project, or name another with "
            "--database"
        )

    def upgrade(current: Any, _: MigrationContext) -> Any:
        return scripts._upgrade_revs(revision, current)

    with EnvironmentContext(Config(), scripts, fn=upgrade, destination_rev=revision) as environment:
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


def _engine(url: str) -> Engine:
    try:
        parsed = sa.make_url(url)
    except ArgumentError:
        raise ConfigError("--database is no database URL; write postgresql://user:password@host/name") from None
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
