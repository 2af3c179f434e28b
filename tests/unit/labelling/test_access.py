"""Who reaches the labelling page, and that a crowd of wrong passwords keeps no worker from those who are signed in."""

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient
from starlette.types import Message

from tasks.labelling import auth
from tasks.labelling.app import MAX_WAITING_SIGN_INS, create_app
from tasks.labelling.auth import MAX_WRONG, WINDOW_SECONDS, SignInLimits
from tasks.labelling.store import LabelStore
from tests.support.labels import make_question
from tests.unit.labelling.test_app import fields

CROWD = 120


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LabelStore]:
    store = LabelStore(f"sqlite:///{tmp_path / 'labels.db'}")
    store.add_labeller("ann", "right")
    store.add_questions([make_question("one")])
    yield store
    store.close()


class Checks:
    """Stands in for argon2: it waits until it may go on, and counts calls, also those at the same time."""

    def __init__(self) -> None:
        self.calls = self.now = self.most = 0
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, password: str, password_hash: str | None) -> bool:
        self.calls, self.now = self.calls + 1, self.now + 1
        self.most = max(self.most, self.now)
        assert self.go_on.wait(60)
        self.now -= 1
        return password == password_hash


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Checks:
    checks = Checks()
    monkeypatch.setattr(auth, "verify", checks)
    return checks


async def sign_in(client: httpx.AsyncClient, name: str, password: str) -> int:
    form = fields((await client.get("/sign-in")).text, "/sign-in")
    return (await client.post("/sign-in", data=form | {"name": name, "password": password})).status_code


def test_while_a_crowd_waits_for_its_passwords_every_page_is_served(store: LabelStore, checks: Checks) -> None:
    """Of other names and other addresses each, so that no limit stops them."""
    app = create_app(store, "secret")

    def client(number: int) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app, client=(f"10.0.0.{number}", 1))
        return httpx.AsyncClient(transport=transport, base_url="http://localhost")

    async def crowd() -> list[int]:
        ann, others = client(0), [client(number + 1) for number in range(CROWD)]
        assert await sign_in(ann, "ann", "right") == 303
        checks.go_on.clear()
        waiting = [asyncio.create_task(sign_in(other, f"eve{place}", "x")) for place, other in enumerate(others)]
        while sum(not task.done() for task in waiting) > MAX_WAITING_SIGN_INS + 1:
            await asyncio.sleep(0)
        page = await asyncio.wait_for(ann.get("/"), 60)
        assert "Which response is better?" in page.text
        assert checks.now == 1, "more than one worker is kept"
        checks.go_on.set()
        return await asyncio.gather(*waiting)

    replies = Counter(asyncio.run(crowd()))
    assert replies == {401: MAX_WAITING_SIGN_INS + 1, 429: CROWD - MAX_WAITING_SIGN_INS - 1}
    assert checks.most == 1


def test_one_address_and_one_name_have_so_many_wrong_passwords_and_any_number_of_right_ones(
    store: LabelStore, checks: Checks
) -> None:
    app = create_app(store, "secret")
    store.add_labeller("bob", "right")

    def reply(address: str, name: str, password: str) -> int:
        client = TestClient(app, client=(address, 1), follow_redirects=False)
        form = fields(client.get("/sign-in").text, "/sign-in")
        return int(client.post("/sign-in", data=form | {"name": name, "password": password}).status_code)

    assert [reply("10.0.0.1", "ann", "right") for _ in range(MAX_WRONG + 2)] == [303] * (MAX_WRONG + 2)
    checks.calls = 0
    wrong = [reply("10.0.0.1", f"eve{number}", "x") for number in range(MAX_WRONG + 2)]
    assert wrong == [401] * MAX_WRONG + [429, 429]
    assert checks.calls == MAX_WRONG, "a refused one costs no argon2"
    assert reply("10.0.0.1", "ann", "right") == 429
    assert reply("10.0.0.2", "ann", "right") == 303
    wrong = [reply(f"10.0.1.{number}", "ann", "x") for number in range(MAX_WRONG + 1)]
    assert wrong == [401] * MAX_WRONG + [429]
    assert reply("10.0.0.2", "bob", "right") == 303


def test_who_has_to_wait_may_try_again_after_it() -> None:
    now = [0.0]
    limits = SignInLimits(lambda: now[0])
    for second in range(MAX_WRONG):
        now[0] = float(second)
        assert limits.seconds_to_wait(["a", "b"]) == 0
        limits.count_wrong(["a", "b"])
    assert limits.seconds_to_wait(["c", "a"]) == WINDOW_SECONDS - now[0]
    assert limits.seconds_to_wait(["c"]) == 0
    now[0] = WINDOW_SECONDS
    assert limits.seconds_to_wait(["a"]) == 0
    limits.count_wrong(["a"])
    assert limits.seconds_to_wait(["a"]) == 1
    now[0] = 3 * WINDOW_SECONDS
    assert limits.seconds_to_wait(["a"]) == 0
    assert not limits._wrong, "it remembers nobody for ever"


@pytest.mark.parametrize(
    ("host", "status"),
    {
        "localhost": 200, "LOCALHOST:8800": 200, "127.0.0.1:8800": 200, "[::1]:8800": 200, "10.1.2.3": 200,
        "label.example.org": 200, "Label.Example.org:443": 200, "evil.example": 400, "evil.example:8800": 400,
        "localhost.evil.example": 400, "evil.example@localhost": 400, "localhost/evil": 400, "[::1]evil": 400,
        "127.0.0.1.evil.example": 400, "0.0.0.0": 400, "": 400, "localhost, evil.example": 400,
    }.items(),
)  # fmt: skip
def test_the_page_answers_to_its_own_names(store: LabelStore, host: str, status: int) -> None:
    app = create_app(store, "secret", hosts=["0.0.0.0", "Label.example.org"])
    client = TestClient(app, base_url="http://10.1.2.3")
    for path in ("/sign-in", "/static/label.js"):
        reply = client.get(path, headers={"host": host})
        assert reply.status_code == status
        assert (status == 200) == ("--allow-host NAME" not in reply.text)


@pytest.mark.parametrize("hosts", [[], [b"localhost", b"evil.example"]])
def test_a_request_without_a_host_or_with_two_is_refused(store: LabelStore, hosts: list[bytes]) -> None:
    headers = [(b"host", host) for host in hosts]
    assert asyncio.run(_send(store, headers, [])) == 400


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
@pytest.mark.parametrize("path", ["/answer", "/sign-in", "/undo", "/sign-out"])
def test_a_client_that_hangs_up_logs_nothing(
    store: LabelStore, path: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    headers = [(b"host", b"localhost"), (b"content-length", b"100"), (b"content-type", kind.encode())]
    body = b"csrf=" if "urlencoded" in kind else b"--x\r\n"
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": True}, {"type": "http.disconnect"}]
    with caplog.at_level(logging.DEBUG, "uvicorn"):
        asyncio.run(_send(store, headers, messages, path))
    assert [record for record in caplog.records if record.name.startswith(("uvicorn", "tasks"))] == []


async def _send(store: LabelStore, headers: list[tuple[bytes, bytes]], body: list[Message], path: str = "/help") -> int:
    """Send a request as a server hands it on; its status. What the application raises, a server logs."""
    sent: list[Message] = []

    async def receive() -> Message:
        return body.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST" if body else "GET", "path": path, "headers": headers, "query_string": b"",
             "scheme": "http", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1), "root_path": ""}  # fmt: skip
    await create_app(store, "secret")(scope, receive, send)
    return int(sent[0]["status"])
