"""Guidelines: what is shown of a Markdown file, and that each label says which ones its labeller was shown."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tasks.core.errors import DataError
from tasks.labelling.app import create_app
from tasks.labelling.auth import hash_password
from tasks.labelling.export import export_preferences
from tasks.labelling.formats import FORMATS, Format, dump, load
from tasks.labelling.guidelines import MAX_LENGTH, Guidelines, render
from tasks.labelling.labels import Label
from tasks.labelling.store import LabelStore
from tests.support.labels import labels_of, make_question, pair
from tests.unit.labelling.test_app import PASSWORD, fields, post, sign_in

TEXT = "\ufeff# What is better\r\n\r\nThe **true** one.\r\n"


@pytest.fixture
def guidelines(tmp_path: Path) -> Guidelines:
    path = tmp_path / "guidelines.md"
    path.write_bytes(TEXT.encode())
    return Guidelines.read(path)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LabelStore]:
    store = LabelStore(f"sqlite:///{tmp_path / 'labels.db'}")
    store.add_labeller("ann", hash_password(PASSWORD))
    store.add_questions([make_question("one"), make_question("two", priority=-1), make_question("three", priority=-2)])
    yield store
    store.close()


def test_they_are_known_by_the_sha256_of_the_file_and_kept(guidelines: Guidelines, store: LabelStore) -> None:
    assert guidelines.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    assert guidelines.html == "<h3>What is better</h3>\n<p>The <strong>true</strong> one.</p>\n"
    for _ in range(2):
        create_app(store, "secret", guidelines=guidelines)
    assert store.guidelines() == {guidelines.sha256: TEXT}


@pytest.mark.parametrize(
    ("markdown", "html"),
    {
        "<script>alert(1)</script>": "&lt;script&gt;",
        "<img src=x onerror=alert(1)>": "&lt;img",
        "a <b onclick='x'>b</b>": "&lt;b onclick",
        "[x](javascript:alert(1))": "[x](javascript:alert(1))",
        "[x](data:text/html,<script>)": "[x](data:",
        "![x](https://example.org/x.png)": "!<a href=",
        '[x](https://example.org "a\\"b")': 'target="_blank" rel="noopener noreferrer"',
        "| a | b |\n|---|---|\n| 1 | 2 |": "<td>1</td>",
        "###### deep": "<h6>deep</h6>",
    }.items(),
)
def test_html_is_text_and_a_link_leaves_the_question_where_it_is(markdown: str, html: str) -> None:
    found = render(markdown)
    assert html in found
    assert not re.search(r"<(?:script|img|b)\b|href=.(?:javascript|data)", found)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        ("\ufeff \n".encode(), "is empty"),
        (b"a\0b", "holds a NUL character"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"x" * (MAX_LENGTH + 1), "at most 100000"),
        (None, "does not exist"),
    ],
)
def test_a_file_that_is_no_text_is_one_message(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "guidelines.md"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        Guidelines.read(path)


def test_a_label_holds_what_was_shown_when_it_was_given(
    guidelines: Guidelines, store: LabelStore, tmp_path: Path
) -> None:
    client = TestClient(create_app(store, "secret"))
    page = sign_in(client)
    assert "Guidelines" not in page
    post(client, page, "/answer", answer="tie")
    shown = TestClient(create_app(store, "secret", guidelines=guidelines), cookies=dict(client.cookies))
    page = shown.get("/").text
    assert guidelines.html in page
    (tmp_path / "others.md").write_text("Others.")
    others = create_app(store, "secret", guidelines=Guidelines.read(tmp_path / "others.md"))
    later = TestClient(others, cookies=dict(client.cookies))
    assert post(later, page, "/answer", answer="tie", guidelines="f" * 64).status_code == 400
    assert post(later, page, "/answer", answer="tie", guidelines="x").status_code == 400
    page = post(later, page, "/answer", answer="tie").text
    post(later, page, "/answer", answer="tie", guidelines=fields(page, "/answer")["guidelines"])
    kept = {label.question_id: label.guidelines for label in store.current_labels()}
    assert kept == {
        "one": None, "two": guidelines.sha256, "three": hashlib.sha256(b"Others.").hexdigest(),
    }  # fmt: skip


def test_an_export_says_which_ones_and_how_often() -> None:
    questions = [pair(1), pair(2)]
    labels = [
        Label(questions[0].id, "ann", "a", 1, guidelines="1" * 64),
        Label(questions[0].id, "bob", "a", 1, guidelines="0" * 64),
        *labels_of(questions[1], ann="b"),
    ]
    each = export_preferences(questions, labels, aggregate="none")
    assert sorted(str(row.guidelines) for row in each.rows) == sorted([f"('{'0' * 64}',)", f"('{'1' * 64}',)", "None"])
    assert each.card["guidelines"] == {"0" * 64: 1, "1" * 64: 1, "none": 1}
    found = {row.id: row for row in export_preferences(questions, labels, aggregate="majority").rows}
    assert found[questions[0].id].guidelines == ("0" * 64, "1" * 64)
    assert "guidelines" not in found[questions[1].id].model_dump()


@pytest.mark.parametrize("kind", FORMATS)
def test_other_programs_files_keep_them(tmp_path: Path, kind: Format) -> None:
    question = pair(1)
    labels = [Label(question.id, "ann", "a", guidelines="1" * 64), Label(question.id, "bob", "b")]
    (tmp_path / "file").write_text(dump([question], labels, kind))
    assert load(tmp_path / "file", kind) == [(question, labels)]
    (tmp_path / "file").write_text(dump([question], labels, kind).replace("1" * 64, "1" * 63))
    with pytest.raises(DataError, match="is no sha256"):
        load(tmp_path / "file", kind)
