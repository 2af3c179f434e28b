"""The labelling page's forms: who may send them, what they keep, and what a labeller sees."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tasks.labelling.app import create_app
from tasks.labelling.auth import hash_password, load_secret, new_password, verify
from tasks.labelling.labels import Label, pseudonym, show_swapped
from tasks.labelling.store import LabelStore
from tests.support.labels import insert_label, make_question

PASSWORD = new_password()


@pytest.fixture
def store(tmp_path: Path) -> LabelStore:
    store = LabelStore(f"sqlite:///{tmp_path / 'labels.db'}")
    store.add_labeller("ann", hash_password(PASSWORD))
    return store


@pytest.fixture
def client(store: LabelStore) -> Iterator[TestClient]:
    with TestClient(create_app(store, "secret")) as client:
        yield client


def fields(page: str, action: str) -> dict[str, str]:
    """The hidden fields of the form that posts there."""
    form = re.search(rf'<form[^>]*action="{action}".*?</form>', page, re.DOTALL)
    assert form, f"no form for {action} on the page:\n{page}"
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', form[0]))


def sign_in(client: TestClient, password: str = PASSWORD, name: str = "ann") -> str:
    return str(post(client, client.get("/sign-in").text, "/sign-in", name=name, password=password).text)


def post(client: TestClient, page: str, action: str, **values: str) -> Any:
    """Send the page's form with these values; the response."""
    return client.post(action, data=fields(page, action) | values)


def test_only_who_signs_in_sees_a_question_until_they_sign_out(store: LabelStore, client: TestClient) -> None:
    store.add_questions([make_question("one")])
    assert client.get("/").url.path == "/sign-in"
    assert "Wrong name or password" in sign_in(client, "wrong")
    assert "Wrong name or password" in sign_in(client, PASSWORD, "eve")
    store.add_labeller("model:judge")
    assert "Wrong name or password" in sign_in(client, "", "model:judge")
    page = sign_in(client)
    assert "prompt one" in page
    assert PASSWORD not in page
    assert post(client, page, "/sign-out").url.path == client.get("/").url.path == "/sign-in"


def test_a_new_password_ends_the_session_and_a_forged_cookie_is_none(store: LabelStore, client: TestClient) -> None:
    sign_in(client)
    assert client.get("/").url.path == "/"
    store.add_labeller("ann", hash_password("another"))
    assert client.get("/").url.path == "/sign-in"
    cookie = TestClient(create_app(store, "another secret"))
    sign_in(cookie, "another")
    client.cookies.set("rlhf_label", cookie.cookies["rlhf_label"])
    assert client.get("/").url.path == "/sign-in"


@pytest.mark.parametrize("csrf", ["", "wrong"])
def test_a_form_of_another_site_changes_nothing(store: LabelStore, client: TestClient, csrf: str) -> None:
    store.add_questions([make_question("one")])
    reply = post(client, sign_in(client), "/answer", csrf=csrf, answer="a1")
    assert reply.status_code == 403
    assert "not saved" in reply.text
    assert store.current_labels() == []


def test_an_answer_is_kept_in_the_stored_order(store: LabelStore, client: TestClient) -> None:
    store.add_questions([make_question(f"item{number}") for number in range(8)])
    page = sign_in(client)
    for _ in range(8):
        first_shown = re.search(r'class="response a".*?class="text">(\w+)', page, re.DOTALL)
        assert first_shown
        question = fields(page, "/answer")["question"]
        page = post(client, page, "/answer", answer="a2", rating_a="5", rating_b="", comment=" so\r\nbe it ").text
        label = store.last_label("ann")
        assert label
        stored = {"first": "a", "second": "b"}[first_shown[1]]
        assert (label.question_id, label.choice, label.swapped) == (question, stored, stored == "b")
        assert (label.strength, label.comment) == (2, "so\nbe it")
        assert (label.rating_a, label.rating_b) == ((5, None) if stored == "a" else (None, 5))
        assert "Saved: <b>A clearly better</b>" in page
    assert {label.swapped for label in store.current_labels()} == {True, False}
    assert "All done, thank you" in page
    assert "8 of 8 answered" in page


def test_the_same_form_twice_counts_once_and_goes_on(store: LabelStore, client: TestClient) -> None:
    store.add_questions([make_question("one"), make_question("two", priority=-1)])
    page = sign_in(client)
    pages = [post(client, page, "/answer", answer="tie") for _ in range(2)]
    assert [page.status_code for page in pages] == [200, 200]
    assert all("prompt two" in page.text for page in pages)
    assert len(store.current_labels()) == 1


def test_a_second_answer_is_refused_kindly_with_what_stands(store: LabelStore, client: TestClient) -> None:
    store.add_questions([make_question("one")])
    page, other = sign_in(client), client.get("/").text
    post(client, page, "/answer", answer="b3")
    reply = post(client, other, "/answer", answer="a1")
    assert reply.status_code == 409
    assert "You have answered this already" in reply.text
    assert "Your saved answer is: B far better." in reply.text
    assert len(store.current_labels()) == 1


def test_undo_shows_the_question_with_its_answer(store: LabelStore, client: TestClient) -> None:
    store.add_questions([make_question("one"), make_question("two", priority=-1)])
    answered = post(client, sign_in(client), "/answer", answer="b1", rating_b="2", comment="a < b").text
    page = post(client, answered, "/undo").text
    assert "prompt one" in page
    assert "You took back <b>B slightly better</b>" in page
    assert "a &lt; b</textarea>" in page
    assert re.search(r'name="rating_b" value="2"[^>]* checked', page)
    assert "prompt one" in post(client, answered, "/undo").text, "the same click twice"
    assert store.current_labels() == []


def test_a_comment_longer_than_the_form_takes_can_be_read(store: LabelStore, client: TestClient) -> None:
    store.add_questions([make_question("one")])
    insert_label(store.address, "one", "ann", choice="tie", comment="x" * 6000)
    assert "Saved: <b>Equally good</b>" in sign_in(client), "the page must show whatever is in the database"


def test_undoing_an_imported_label_shows_it_in_the_order_of_the_page(store: LabelStore, client: TestClient) -> None:
    item = next(name for name in map(str, range(20)) if show_swapped(name, "ann"))
    store.add_questions([make_question(item)])
    store.save_label(Label(item, "ann", "a", 3, rating_a=5, rating_b=1))
    page = sign_in(client)
    assert "Saved: <b>B far better</b>" in page, "the page shows response_b first, as A"
    page = post(client, page, "/undo").text
    assert "You took back <b>B far better</b>" in page
    rated = dict(re.findall(r'name="(rating_[ab])" value="(\d)"[^>]* checked', page))
    post(client, page, "/answer", answer="b3", **rated)
    (again,) = store.current_labels()
    assert (again.choice, again.rating_a, again.rating_b) == ("a", 5, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"answer": "best"},
        {"answer": "a1", "rating_a": "9"},
        {"answer": "a1", "previous_event": "x"},
        {"answer": "a1", "token": "x"},
        {"answer": "a1", "question": "none"},
        {"answer": "a1", "comment": "x" * 5001},
        {"answer": "a1", "comment": "x\0y"},
    ],
)
def test_a_form_that_the_page_would_not_send_is_one_message(
    store: LabelStore, client: TestClient, change: dict[str, str]
) -> None:
    store.add_questions([make_question("one")])
    reply = post(client, sign_in(client), "/answer", **change)
    assert reply.status_code == 400
    assert "Nothing was saved" in reply.text
    assert store.current_labels() == []


def test_a_form_without_end_is_not_read(client: TestClient) -> None:
    form = fields(sign_in(client), "/sign-out")
    assert client.post("/sign-out", data={**form, "more": "x" * 200_000}).status_code == 413
    assert client.post("/sign-out", content=iter([b"csrf=1"])).status_code == 413, "of unknown length"


def test_texts_stay_texts_and_gold_stays_hidden(store: LabelStore, client: TestClient) -> None:
    texts = {"prompt": "<script>x</script>", "response_a": "  two\n\n  lines ", "response_b": " "}
    store.add_questions([make_question("one", **texts, gold="a", reason="gold", policy_a="teacher")])
    page = sign_in(client)
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    assert "  two\n\n  lines </div>" in page
    assert "(an empty response)" in page
    assert not re.search("gold|teacher", page)


def test_a_labeller_finds_herself_in_reports(client: TestClient) -> None:
    assert "person-" not in client.get("/help").text
    sign_in(client)
    assert f"there you are <code>{pseudonym('ann')}</code>" in client.get("/help").text


def test_with_nothing_to_ask_the_page_explains_what_to_do(store: LabelStore, client: TestClient) -> None:
    assert "rlhf label sample" in sign_in(client)
    store.add_questions([make_question("one")])
    store.add_labeller("bob", "hash")
    assert store.next_task("bob")
    page = client.get("/").text
    assert "Others have the rest on their screens" in page
    assert "1 more pair waits" in page


def test_pages_bring_everything_along_and_keep_the_cookie_from_scripts_and_other_sites(client: TestClient) -> None:
    page = client.get("/sign-in")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert {"httponly", "samesite=lax"} <= set(page.headers["set-cookie"].lower().split("; "))
    for path in re.findall(r'(?:src|href)="(/static/[^"]+)"', page.text):
        assert client.get(path).status_code == 200
    assert not re.search(r"https?://", page.text)
    assert client.get("/nothing").status_code == 404


def test_the_secret_is_made_once_and_is_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    first = load_secret(path)
    assert load_secret(path) == first
    assert len(first) == 64
    assert path.stat().st_mode & 0o077 == 0
    assert [item.name for item in tmp_path.iterdir()] == ["secret"]


def test_passwords() -> None:
    assert re.fullmatch(r"([a-z2-9]{4}-){3}[a-z2-9]{4}", PASSWORD)
    kept = hash_password(PASSWORD)
    assert kept.startswith("$argon2id$")
    assert verify(PASSWORD, kept)
    assert not verify(f"{PASSWORD}x", kept)
    assert not verify(PASSWORD, None)
