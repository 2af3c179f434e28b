"""Deeds for a server that is sometimes away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from filelock import FileLock

from tasks.runtime import outbox as module
from tasks.runtime.outbox import Outbox, deliver_left


class Server:
    """Away when told so; `lost` does the deed and loses the answer."""

    def __init__(self) -> None:
        self.done: list[tuple[str, dict[str, object]]] = []
        self.away = self.lost = False
        self.told: list[str] = []

    def do(self, deed, content):
        if deed == "wrong":
            raise ValueError("no such thing")
        if self.away and not self.lost:
            raise ConnectionError("away")
        self.done.append((deed, dict(content)))
        if self.lost:
            raise ConnectionError("the answer was lost")

    def outbox(self, path: Path) -> Outbox:
        return Outbox(path, self.do, lambda error: isinstance(error, ConnectionError), self.told.append)


@pytest.fixture
def server() -> Server:
    return Server()


def test_at_once_while_the_server_answers(server: Server, tmp_path: Path) -> None:
    server.outbox(tmp_path / "a.jsonl").put("metric", value=1)
    assert server.done == [("metric", {"value": 1})]
    assert list(tmp_path.iterdir()) == []


def test_in_order_when_it_is_back_and_told_once(server: Server, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)
    box = server.outbox(tmp_path / "a.jsonl")
    server.away = True
    for value in range(3):
        box.put("metric", value=value)
    assert not box.deliver()
    assert len(server.told) == 1
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 3
    server.away = False
    box.put("metric", value=3)
    assert [content["value"] for _, content in server.done] == [0, 1, 2, 3]
    assert not (tmp_path / "a.jsonl").exists()


def test_a_server_that_is_away_is_not_asked_at_every_deed(server: Server, tmp_path: Path) -> None:
    box = server.outbox(tmp_path / "a.jsonl")
    server.away = True
    box.put("metric", value=0)
    server.away = False
    box.put("metric", value=1)
    assert server.done == [], "it waits before it asks again"
    assert box.deliver()
    assert [content["value"] for _, content in server.done] == [0, 1]


def test_what_a_killed_process_left_is_delivered_by_another(server: Server, tmp_path: Path) -> None:
    server.away = True
    box = server.outbox(tmp_path / "a.jsonl")
    box.put("metric", value=0)
    box.put("metric", value=1)
    server.away = False
    deliver_left(tmp_path, server.outbox, server.told.append)
    assert server.done == [], "its process lives"
    box._lock.release()
    deliver_left(tmp_path, server.outbox, server.told.append)
    assert [content["value"] for _, content in server.done] == [0, 1]
    assert list(tmp_path.iterdir()) == []


def test_what_was_done_is_crossed_out_one_by_one(server: Server, tmp_path: Path) -> None:
    server.away = True
    box = server.outbox(tmp_path / "a.jsonl")
    for value in range(3):
        box.put("metric", value=value)
    server.away, server.lost = False, True
    assert not box.deliver()
    rows = [json.loads(line)["content"]["value"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert rows == [0, 1, 2], "an answer that was lost does not count as done"
    server.lost = False
    assert box.deliver()
    assert [content["value"] for _, content in server.done] == [0, 0, 1, 2]


def test_an_error_that_is_ours_is_raised_and_not_kept(server: Server, tmp_path: Path) -> None:
    box = server.outbox(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="no such thing"):
        box.put("wrong")
    assert list(tmp_path.iterdir()) == []


def test_a_living_process_delivers_its_own(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"deed": "metric", "content": {}}\n')
    with FileLock(tmp_path / "a.lock"):
        deliver_left(tmp_path, server.outbox, server.told.append)
    assert server.done == []


def test_what_is_refused_is_set_aside_and_told(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"deed": "wrong", "content": {}}\n')
    (tmp_path / "b.jsonl").write_text('{"deed": "metric", "content": {}}\n')
    deliver_left(tmp_path, server.outbox, server.told.append)
    assert server.done == [("metric", {})]
    assert [path.name for path in tmp_path.iterdir()] == ["a.refused"]
    assert "no such thing" in server.told[0]
