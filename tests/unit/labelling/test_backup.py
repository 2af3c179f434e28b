"""The copy of a labelling database: what it holds, what it refuses, and that the database can be rebuilt from it."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from tasks.core.errors import ConfigError, DataError, RLHFError, SourceError
from tasks.labelling.backup import copy_path, restore
from tasks.labelling.database import UnavailableError
from tasks.labelling.labels import Label
from tasks.labelling.store import LabelStore
from tests.support.labels import insert_label, make_question, token

ROOT = Path(__file__).resolve().parents[3]
ACKNOWLEDGED = 12


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "labels.db"


def opened(file: Path) -> closing[LabelStore]:
    return closing(LabelStore(f"sqlite:///{file}"))


def fill(file: Path) -> None:
    """Two questions, and a label that was changed of mind, of which the last stands."""
    with opened(file) as store:
        store.add_labeller("ann", "hash")
        store.add_guidelines("0" * 64, "Be kind.")
        store.add_questions([make_question("one", gold="a"), make_question("two", prompt="ü\u2028\n", priority=2.5)])
        store.save_label(Label("one", "ann", "b", 2, 1, 5, "so\nbe it", True, 3.5, "0" * 64))
        store.undo("ann", token=token(), event_id=1)
        store.save_label(Label("one", "ann", "tie"))
        store.save_label(Label("two", "model:judge", "skip"))


def rows(file: Path) -> dict[str, list[tuple[object, ...]]]:
    with closing(sqlite3.connect(file)) as connection:
        tables = ("questions", "labellers", "guidelines", "events")
        return {name: sorted(connection.execute(f"select * from {name}").fetchall()) for name in tables}


def destroy_whole(file: Path) -> None:
    file.write_bytes(os.urandom(len(file.read_bytes())))


def destroy_pages(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:4096] + b"\xaa" * (len(content) - 4096))


def destroy_one_page(file: Path) -> None:
    """That of an index which opening the database does not read."""
    with closing(sqlite3.connect(file)) as connection:
        name = "sqlite_autoindex_events_2"
        (page,) = connection.execute("select rootpage from sqlite_master where name = ?", [name]).fetchone()
    content = file.read_bytes()
    file.write_bytes(content[: (page - 1) * 4096] + b"\xaa" * 4096 + content[page * 4096 :])


def destroy_header(file: Path) -> None:
    file.write_bytes(b"x" * 4096 + file.read_bytes()[4096:])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:10_000])


DAMAGES = {
    destroy_whole: "damaged or no database",
    destroy_pages: "is damaged|malformed",
    destroy_one_page: "is damaged",
    destroy_header: "damaged or no database",
    cut: "damaged|malformed",
    empty: "0 bytes",
    Path.unlink: "is missing, and its copy holds 4 answers",
}


@pytest.mark.parametrize(("destroy", "message"), DAMAGES.items())
def test_what_is_destroyed_is_one_message_and_comes_back(
    file: Path, destroy: Callable[[Path], None], message: str
) -> None:
    fill(file)
    before = rows(file)
    destroy(file)
    with pytest.raises(RLHFError, match=message) as caught:
        LabelStore(f"sqlite:///{file}")
    assert "`rlhf label restore`" in str(caught.value)
    left = file.read_bytes() if file.exists() else None
    result = restore(f"sqlite:///{file}")
    assert rows(file) == before
    assert result.rows == {name: len(content) for name, content in before.items()}
    assert (result.old.read_bytes() if result.old else None) == left, "what is left of the old one is kept"
    with opened(file) as store:
        assert [(label.labeller, label.choice) for label in store.current_labels()] == [
            ("ann", "tie"), ("model:judge", "skip"),
        ]  # fmt: skip
        store.save_label(Label("two", "ann", "a"))


def test_every_answer_that_counted_as_saved_outlives_a_kill_and_the_database(file: Path) -> None:
    command = [sys.executable, "-m", "tests.support.killed_saving", f"sqlite:///{file}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        tokens = {child.stdout.readline().strip() for _ in range(ACKNOWLEDGED)}
        child.send_signal(signal.SIGKILL)
        tokens |= set(child.stdout.read().split())
    for part in file.parent.glob("labels.db*"):
        if part != copy_path(file):
            part.write_bytes(b"gone")
    with copy_path(file).open("ab") as copy:
        copy.write(b'{"table": "events", "row": {"event_id')  # as a kill in the middle of a line leaves it
    result = restore(f"sqlite:///{file}")
    assert result.unreadable == 1
    restored = {row[1] for row in rows(file)["events"]}
    assert len(tokens) >= ACKNOWLEDGED
    assert tokens <= restored
    fill_more(file)
    empty(file)
    restore(f"sqlite:///{file}")
    assert {row[1] for row in rows(file)["events"]} == restored | {"after"}, "what follows a torn line is read"


def fill_more(file: Path) -> None:
    with opened(file) as store:
        store.save_label(Label("item0", "bob", "a"), token="after")


def test_the_copy_has_what_another_program_wrote_and_what_was_there_before_it(file: Path) -> None:
    fill(file)
    copy_path(file).unlink()
    with opened(file) as store, opened(file) as other:
        other.save_label(Label("two", "bob", "a"))
        store.add_labeller("ann", "a new hash")
        insert_label(f"sqlite:///{file}", "two", "ann", choice="b")
    with opened(file):
        pass
    before = rows(file)
    file.unlink()
    restore(f"sqlite:///{file}")
    assert rows(file) == before
    assert len(before["events"]) == 6


def test_an_older_database_in_its_place_is_refused(file: Path) -> None:
    fill(file)
    older = file.read_bytes()
    with opened(file) as store:
        store.save_label(Label("two", "bob", "a"))
    newer = rows(file)
    file.write_bytes(older)
    with pytest.raises(DataError, match="lacks 1 events that its copy"):
        LabelStore(f"sqlite:///{file}")
    restore(f"sqlite:///{file}")
    assert rows(file) == newer


def test_the_copy_is_its_owners(file: Path) -> None:
    fill(file)
    assert copy_path(file).stat().st_mode & 0o077 == 0


def test_nothing_is_rebuilt_under_an_open_database_or_from_no_copy(file: Path) -> None:
    fill(file)
    with opened(file), pytest.raises(SourceError, match="end `rlhf label` first"):
        restore(f"sqlite:///{file}")
    copy_path(file).write_text("nothing\n")
    before = rows(file)
    with pytest.raises(DataError, match="holds nothing that can be read"):
        restore(f"sqlite:///{file}")
    copy_path(file).unlink()
    with pytest.raises(DataError, match="there is no copy"):
        restore(f"sqlite:///{file}")
    assert rows(file) == before
    with pytest.raises(ConfigError, match="only an SQLite database"):
        restore("postgresql://host/labels")


def test_answers_to_a_lost_question_are_counted_and_a_lost_labellers_are_kept(file: Path) -> None:
    fill(file)
    lines = copy_path(file).read_bytes().splitlines(keepends=True)
    lost = [line for line in lines if b'"id": "two"' not in line and b'"table": "labellers"' not in line]
    copy_path(file).write_bytes(b"".join(lost))
    result = restore(f"sqlite:///{file}")
    assert result.unreadable == 1
    with opened(file) as store:
        assert [label.question_id for label in store.current_labels()] == ["one"]
        assert store.labellers() == [], "known by name, and without a password"


@pytest.mark.parametrize("tables", ["notes", "alembic_version", ""])
def test_a_database_of_something_else_is_left_alone(file: Path, tables: str) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(f"create table {tables or 'x'} (version_num text)")
        if not tables:
            connection.execute("drop table x")
        connection.commit()
    before = file.read_bytes()
    with pytest.raises(DataError, match=f"is no labelling database: its tables are {tables or 'none'}"):
        LabelStore(f"sqlite:///{file}")
    assert file.read_bytes() == before


def test_parts_of_a_lost_database_are_not_taken_for_a_new_ones(file: Path) -> None:
    Path(f"{file}-wal").write_bytes(b"answers that are not in the database's own file yet")
    with pytest.raises(DataError, match="is there without its database"):
        LabelStore(f"sqlite:///{file}")
    assert not file.exists()


def test_pages_destroyed_while_it_is_open_are_one_error(file: Path) -> None:
    fill(file)
    with opened(file) as store:
        engine = create_engine(f"sqlite:///{file}")
        with engine.connect() as connection:
            connection.execute(text("pragma wal_checkpoint(truncate)"))
        engine.dispose()
        destroy_pages(file)
        with pytest.raises(UnavailableError, match=r"damaged.*`rlhf label restore`"):
            store.current_labels()
