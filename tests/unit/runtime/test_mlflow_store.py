"""Writes to a server that is sometimes away."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tasks.runtime import mlflow_store
from tasks.runtime.mlflow_store import QueuedRun, flush_stale, queued


@dataclass
class Server:
    """Does not answer while away; `lost` writes and loses the answer. Its runs' queue is `file`."""

    file: Path
    written: list[object] = field(default_factory=list)
    away: bool = False
    lost: bool = False

    def open(self, path: Path | None = None) -> ToyRun:
        return ToyRun(path or self.file, self)


class ToyRun(QueuedRun):
    def __init__(self, path: Path, server: Server) -> None:
        super().__init__(path)
        self.server, self.times = server, list[int]()

    @queued
    def log(self, value: object, *, factor: int = 1) -> None:
        if self.server.away and not self.server.lost:
            raise ConnectionError("away")
        self.server.written.append(value * factor if isinstance(value, int) else value)
        self.times.append(self.time)
        if self.server.lost:
            raise ConnectionError("the answer was lost")

    @queued
    def fail(self) -> None:
        raise ValueError("no such thing")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    monkeypatch.setattr(mlflow_store, "is_unavailable", lambda error: isinstance(error, ConnectionError))
    return Server(tmp_path / "a.jsonl")


def test_at_once_while_the_server_answers_and_an_error_that_is_ours_is_raised(server: Server, tmp_path: Path) -> None:
    run = server.open()
    run.log(2, factor=3)
    run.log(tmp_path)
    assert server.written == [6, str(tmp_path)]
    with pytest.raises(ValueError, match="no such thing"):
        run.fail()
    assert list(tmp_path.iterdir()) == []


def test_in_order_when_it_is_back_and_one_warning(server: Server, monkeypatch, capsys) -> None:
    monkeypatch.setattr(mlflow_store, "RETRY_SECONDS", 0.0)
    run = server.open()
    server.away = True
    for value in range(3):
        run.log(value)
    assert not run.flush()
    assert capsys.readouterr().err.count("is kept in") == 1
    assert len(server.file.read_text().splitlines()) == 3
    server.away = False
    run.log(3)
    assert server.written == [0, 1, 2, 3]
    assert not server.file.exists()


def test_a_server_that_is_away_is_not_tried_at_every_write(server: Server) -> None:
    run = server.open()
    server.away = True
    run.log(0)
    server.away = False
    run.log(1)
    assert server.written == [], "it waits before it tries again"
    assert run.flush()
    assert server.written == [0, 1]


def test_a_write_has_the_time_of_its_submission(server: Server, monkeypatch) -> None:
    run = server.open()
    server.away = True
    for seconds in (1.0, 2.0):
        monkeypatch.setattr("time.time", lambda now=seconds: now)
        run.log(seconds)
    server.away = False
    monkeypatch.setattr("time.time", lambda: 9.0)
    assert run.flush()
    assert run.times == [1000, 2000]


def test_what_a_killed_process_left_is_written_by_another(server: Server, tmp_path: Path) -> None:
    server.away = True
    run = server.open()
    run.log(0)
    run.log(1, factor=5)
    server.away = False
    flush_stale(tmp_path, server.open)
    assert server.written == [], "its process lives"
    run._lock.release()
    flush_stale(tmp_path, server.open)
    assert server.written == [0, 5]
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ends_while_the_server_is_away_leaves_its_writes_to_others(server: Server, tmp_path: Path) -> None:
    server.away = True
    run = server.open()
    run.log(0)
    run.close()
    flush_stale(tmp_path, server.open)
    assert server.written == [], "it is still away"
    server.away = False
    flush_stale(tmp_path, server.open)
    assert server.written == [0]
    assert list(tmp_path.iterdir()) == []


def test_a_flush_writes_the_file_once_and_keeps_what_was_not_taken(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.away = True
    run = server.open()
    for value in range(9):
        run.log(value)
    server.away = False
    sizes, call, save = [], run._call, run._save
    monkeypatch.setattr(run, "_save", lambda: (save(), sizes.append(len(run._waiting))))

    def until_five(line: str) -> None:
        server.away = len(server.written) == 5
        call(line)

    monkeypatch.setattr(run, "_call", until_five)
    assert not run.flush()
    assert [json.loads(line)[2] for line in server.file.read_text().splitlines()] == [[5], [6], [7], [8]]
    assert sizes == [4], "once, and not once for each"
    monkeypatch.setattr(run, "_call", call)
    server.away = False
    assert run.flush()
    assert server.written == [*range(9)]


def test_a_process_that_is_killed_while_it_flushes_loses_nothing(server: Server, tmp_path: Path) -> None:
    server.away = True
    run = server.open()
    for value in range(3):
        run.log(value)
    before = server.file.read_text()
    server.away = False
    run._save = lambda: None  # killed before the end
    run.flush()
    assert server.file.read_text() == before
    flush_stale(tmp_path, server.open)
    assert server.written == [0, 1, 2, 0, 1, 2]


def test_a_write_whose_answer_was_lost_stays(server: Server) -> None:
    server.away = True
    run = server.open()
    for value in range(3):
        run.log(value)
    server.away, server.lost = False, True
    assert not run.flush()
    rows = [json.loads(line)[2] for line in server.file.read_text().splitlines()]
    assert rows == [[0], [1], [2]], "a write whose answer was lost stays"
    server.lost = False
    assert run.flush()
    assert server.written == [0, 0, 1, 2]


def test_what_is_refused_is_set_aside_with_a_warning(server: Server, tmp_path: Path, capsys) -> None:
    server.file.write_text('["ToyRun.fail", 0, [], {}]\n')
    (tmp_path / "b.jsonl").write_text('["ToyRun.log", 0, [1], {}]\n')
    flush_stale(tmp_path, server.open)
    assert server.written == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["a.refused"]
    assert "no such thing" in capsys.readouterr().err
