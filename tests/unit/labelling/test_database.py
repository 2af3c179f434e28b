"""The database's migrations and the safety of its address."""

import shutil
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

from tasks.core.errors import ConfigError, DataError, SourceError
from tasks.labelling.database import connect, metadata, migrations, redact_url
from tasks.labelling.labels import Label
from tasks.labelling.store import LabelStore
from tests.support.labels import begun, make_question

NEXT_REVISION = """
import sqlalchemy as sa
from alembic import op
revision, down_revision, branch_labels, depends_on = "9998", "0002", None, None
def upgrade():
    op.add_column("questions", sa.Column("language", sa.String(8)))
"""


def test_its_tables_are_those_of_the_code_at_the_newest_revision(url: str) -> None:
    for _ in range(2):
        connect(url).dispose()
        with begun(url) as connection:
            context = MigrationContext.configure(connection)
            assert compare_metadata(context, metadata) == []
            assert context.get_current_revision() == migrations().get_current_head()


def test_labels_outlive_a_migration(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a revision after the newest."""
    with closing(LabelStore(url)) as store:
        store.add_questions([make_question("one")])
        store.save_label(Label("one", "ann", "a"))
    folder = Path(shutil.copytree(migrations().dir, tmp_path / "migrations"))
    (folder / "v9998_next.py").write_text(NEXT_REVISION)
    scripts = ScriptDirectory(str(folder), version_locations=[str(folder)])
    monkeypatch.setattr("tasks.labelling.database.migrations", lambda: scripts)
    with closing(LabelStore(url)) as store:
        assert [label.choice for label in store.current_labels()] == ["a"]
    with begun(url) as connection:
        assert connection.execute(text("select id, language from questions")).all() == [("one", None)]
        assert MigrationContext.configure(connection).get_current_revision() == "9998"


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
