"""The database's migrations and the safety of its address."""

from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from tasks.core.errors import ConfigError, DataError, SourceError
from tasks.labelling.database import connect, metadata, migrate, migrations, redact_url
from tasks.labelling.labels import Label
from tasks.labelling.store import LabelStore
from tests.support.labels import begun, make_question

REVISIONS = [script.revision for script in migrations().walk_revisions()]


@pytest.mark.parametrize("revision", [None, *REVISIONS])
def test_from_every_revision_it_comes_to_the_tables_of_the_code(url: str, revision: str | None) -> None:
    if revision:
        with begun(url) as connection:
            migrate(connection, revision)
            assert MigrationContext.configure(connection).get_current_revision() == revision
    connect(url).dispose()
    with begun(url) as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        assert MigrationContext.configure(connection).get_current_revision() == REVISIONS[0]


def test_labels_outlive_a_migration(url: str) -> None:
    with begun(url) as connection:
        migrate(connection, REVISIONS[-1])
        connection.execute(text("insert into labellers values ('ann', 'hash', '2026-01-01 00:00:00+00:00')"))
    with closing(LabelStore(url)) as store:
        store.add_questions([make_question("one")])
        store.save_label(Label("one", "ann", "a"))
    with closing(LabelStore(url)) as store:
        assert [label.choice for label in store.current_labels()] == ["a"]
        assert store.labellers() == ["ann"]


def test_labels_from_before_guidelines_have_none(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    with begun(url) as connection:
        migrate(connection, "0001")
        for statement in (
            "insert into labellers values ('ann', 'hash', '2026-01-01 00:00:00.000000')",
            "insert into questions values ('one', 'p', 'x', 'y', 's', 't', null, 'random', 0, 1, '2026-01-01 00:00')",
            "insert into events values (1, 't', 'one', 'ann', 0, 'label', 'a', 2, null, 4, 'so', 1, 2.5, '2026-01-01')",
        ):
            connection.execute(text(statement.replace("'2026-01-01')", "'2026-01-01 00:00:00.000000')")))
    with closing(LabelStore(url)) as store:
        assert store.current_labels() == [Label("one", "ann", "a", 2, None, 4, "so", swapped=True, seconds=2.5)]
        store.add_guidelines("0" * 64, "Be kind.")
        store.save_label(Label("one", "bob", "b", guidelines="0" * 64))
        assert [label.guidelines for label in store.current_labels()] == [None, "0" * 64]


def test_a_newer_database_is_left_alone(url: str) -> None:
    LabelStore(url).close()
    with begun(url) as connection:
        connection.execute(text("update alembic_version set version_num = '9999'"))
    with pytest.raises(DataError, match="is at revision 9999, which this code does not know: a newer version wrote it"):
        LabelStore(url)


def test_sqlite_is_set_to_lose_nothing(tmp_path: object) -> None:
    engine = connect(f"sqlite:///{tmp_path}/labels.db")
    expected = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30000}
    with engine.connect() as connection:
        found = {name: connection.execute(text(f"pragma {name}")).scalar() for name in expected}
    engine.dispose()
    assert found == expected


def test_the_password_is_never_shown() -> None:
    for url in ("postgresql://ann:word@host/labels", "postgresql://ann@host/labels?password=word"):
        assert "word" not in redact_url(url)
        assert "host/labels" in redact_url(url)
    with pytest.raises(SourceError, match="cannot use the labelling database") as caught:
        connect("postgresql://ann:sesame@127.0.0.1:1/labels")
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("url", ["mysql://host/labels", "labels.db"])
def test_another_kind_of_database_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--database"):
        LabelStore(url)
