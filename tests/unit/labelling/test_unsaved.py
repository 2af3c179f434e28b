"""The page while its database cannot be used: it says so, keeps the labeller's choice, and logs one line."""

import errno
import os
import re
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from tasks.labelling import backup
from tasks.labelling.app import create_app
from tasks.labelling.auth import hash_password
from tasks.labelling.backup import copy_path, restore
from tasks.labelling.store import LabelStore
from tests.support.labels import make_question
from tests.unit.labelling.test_app import PASSWORD, fields, post, sign_in

Spoil = Callable[[LabelStore, pytest.MonkeyPatch], Callable[[], object]]

COMMENT = 'It is "longer" & <b>\n' + "x" * 4900
"""More than a page of the database holds."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LabelStore]:
    store = LabelStore(f"sqlite:///{tmp_path / 'labels.db'}")
    store.add_labeller("ann", hash_password(PASSWORD))
    store.add_questions([make_question("one"), make_question("two", priority=-1)])
    yield store
    store.close()


@pytest.fixture
def client(store: LabelStore) -> Iterator[TestClient]:
    with TestClient(create_app(store, "secret")) as client:
        yield client


def full_disk(store: LabelStore, _: pytest.MonkeyPatch) -> Callable[[], object]:
    """SQLite's limit on pages: a database that may not grow says the same as a full disk."""
    return set_pragma(store, "max_page_count", 1, 10**6)


def read_only(store: LabelStore, _: pytest.MonkeyPatch) -> Callable[[], object]:
    return set_pragma(store, "query_only", 1, 0)


def set_pragma(store: LabelStore, name: str, bad: int, good: int) -> Callable[[], object]:
    values = [bad]
    event.listen(store._engine, "begin", lambda connection: connection.exec_driver_sql(f"pragma {name}={values[-1]}"))
    return lambda: values.append(good)


def full_disk_of_the_copy(_: LabelStore, monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    """The disk takes half a line."""
    written: list[int] = []

    def write(file: int, content: bytes) -> int:
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(real(file, content[: len(content) // 2]))
        return written[0]

    real = os.write
    monkeypatch.setattr(backup.os, "write", write)
    return monkeypatch.undo


REASONS = {
    full_disk: "database or disk is full",
    read_only: "attempt to write a readonly database",
    full_disk_of_the_copy: "No space left on device",
}


@pytest.mark.parametrize(("spoil", "reason"), REASONS.items())
def test_an_answer_that_is_not_saved_is_kept_on_the_page_until_it_is(
    store: LabelStore, client: TestClient, spoil: Spoil, reason: str,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    page = sign_in(client)
    mend = spoil(store, monkeypatch)
    for _ in range(5):
        reply = post(client, page, "/answer", answer="b2", rating_a="4", comment=COMMENT)
        assert reply.status_code == 503
        assert (
            f"<h1>Not saved, try again</h1>\n<p>The labelling database cannot be used just now: {reason}" in reply.text
        )
        assert "<b>B clearly better</b>" in reply.text
        assert 'data-unsaved="Not saved, try again' in reply.text, "the script shows it"
        assert str(store.address) not in reply.text, "a labeller learns nothing of the server's files"
    logged = [record for record in caplog.records if record.name.startswith("tasks")]
    assert len(logged) == 1
    assert logged[0].exc_info is None
    assert reason in logged[0].getMessage()
    mend()
    kept = {name: unescape(value) for name, value in fields(reply.text, "/answer").items()}
    assert client.post("/answer", data=kept).url.path == "/"
    (label,) = store.current_labels()
    sides = {"rating_a": label.rating_a, "rating_b": label.rating_b}
    assert (label.strength, label.comment, sorted(map(str, sides.values()))) == (2, COMMENT, ["4", "None"])
    file = Path(store.address.removeprefix("sqlite:///"))
    store.close()
    file.unlink()
    assert restore(store.address).rows["events"] == 1, "what counts as saved is in the copy"
    assert copy_path(file).read_bytes().count(b'"table": "events"') in (1, 2)


def test_an_undo_and_a_sign_in_that_cannot_be_are_messages(store: LabelStore, client: TestClient) -> None:
    page = post(client, sign_in(client), "/answer", answer="tie").text
    form = client.get("/sign-in").text
    mend = read_only(store, pytest.MonkeyPatch())
    reply = post(client, page, "/undo")
    assert reply.status_code == 503
    assert "<b>Undo</b>" in reply.text
    broken = OperationalError("select", {}, Exception("no such thing"))
    event.listen(store._engine, "begin", lambda _: (_ for _ in ()).throw(broken), insert=True)
    reply = post(client, form, "/sign-in", name="ann", password=PASSWORD)
    assert reply.status_code == 503
    assert PASSWORD not in reply.text
    reply = client.get("/")
    assert (reply.status_code, "data-unsaved" in reply.text) == (503, False)
    reply = client.get("/nothing")
    assert reply.status_code == 503, "a page that says what is wrong reads the database, too"
    mend()


def test_damaged_pages_are_a_message(store: LabelStore, client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    page = sign_in(client)
    file = Path(store.address.removeprefix("sqlite:///"))
    with store._engine.connect() as connection:
        connection.exec_driver_sql("pragma wal_checkpoint(truncate)")
    content = file.read_bytes()
    file.write_bytes(content[:4096] + b"\xaa" * (len(content) - 4096))
    store._engine.dispose()
    for _ in range(3):
        replies: list[Any] = [client.get("/"), post(client, page, "/answer", answer="tie")]
        assert [reply.status_code for reply in replies] == [503, 503]
        assert "damaged" in replies[1].text
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("tasks")]
    assert 1 <= len(logged) == len(set(logged)) <= 2
    assert all(re.search("`rlhf label restore`", line) for line in logged)
