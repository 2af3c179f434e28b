"""The labelling database: SQLite in the project by default, PostgreSQL by URL; brought up to date when it is opened."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError

from tasks.core.errors import ConfigError, DataError, SourceError
from tasks.core.paths import state_dir

__all__ = ["alembic_config", "connect", "database_url", "migrate", "shown"]

BUSY_SECONDS = 30
"""How long a writer waits for another one's transaction in SQLite."""

MIGRATION_LOCK = 0x524C4846
"""Of PostgreSQL's advisory locks: two programs that open a new database at once migrate it one after the other."""


def database_url(url: str | None) -> str:
    """The URL that was asked for, else `.rlhf/labels.db` of this project."""
    if url:
        return url
    state_dir().mkdir(exist_ok=True)
    return f"sqlite:///{state_dir() / 'labels.db'}"


def shown(url: str | URL) -> str:
    """The URL as a person may see it: without its password, wherever that stands."""
    parsed = make_url(url)
    return parsed.difference_update_query(["password", "passfile"]).render_as_string(hide_password=True)


def connect(url: str) -> Engine:
    """An engine for the database, whose tables are made or migrated first.

    Raises:
        ConfigError: no database URL, or of a kind that we do not support.
        SourceError: the database does not answer.
        DataError: the database was written by a newer version of this code.
    """
    engine = _engine(url)
    try:
        with engine.execution_options(writes=True).begin() as connection:
            migrate(connection)
    except DBAPIError as error:
        reason = str(error.orig).strip()
        engine.dispose()
        raise SourceError(
            f"cannot open the labelling database {shown(url)}: {reason}; see that it runs, and check --database"
        ) from None
    except DataError:
        engine.dispose()
        raise
    return engine


def migrate(connection: Connection, revision: str = "head") -> None:
    """Bring the tables to a revision, within the transaction of this connection.

    Raises:
        DataError: the database was written by a newer version of this code.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("select pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
    config = alembic_config()
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    unknown = set(MigrationContext.configure(connection).get_current_heads()) - known
    if unknown:
        raise DataError(
            f"the labelling database {shown(connection.engine.url)} is at revision {', '.join(sorted(unknown))}, which "
            "this code does not know: a newer version wrote it. Update the project, or name another with --database"
        )
    command.upgrade(config, revision)


def alembic_config() -> Config:
    """Where the migrations are: within this package, so that no file of the user's is needed."""
    config = Config()
    folder = Path(__file__).parent / "migrations"
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigError("--database is no database URL; write postgresql://user:password@host/name") from None
    kind = parsed.get_backend_name()
    if kind not in ("sqlite", "postgresql"):
        raise ConfigError(f"--database names a database of kind {kind!r}; sqlite and postgresql are supported")
    if kind == "postgresql":
        try:
            return create_engine(parsed, pool_pre_ping=True)
        except ModuleNotFoundError as error:
            raise ConfigError(f"PostgreSQL needs {error.name}: pip install psycopg2-binary") from None
    engine = create_engine(parsed, connect_args={"timeout": BUSY_SECONDS})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    """A commit is on the disk before it is acknowledged; readers and a writer do not block each other."""
    connection.isolation_level = None  # the driver begins transactions late, and not before every statement
    with contextlib.closing(connection.cursor()) as cursor:
        for pragma in ("journal_mode=WAL", "foreign_keys=ON", "synchronous=FULL"):
            cursor.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    """A writer takes its lock at once: one that has read before it writes could not wait for another one."""
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
