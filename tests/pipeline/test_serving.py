"""`rlhf serve` and `rlhf feedback` as a person starts them: switches, kills, an MLflow that is away, deletion."""

import concurrent.futures
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from ruamel.yaml import YAML

from tests.pipeline.conftest import PATIENCE, Project, wait_for

pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(3600)]

CLIENTS = 20
ASK = {"prompt": "the film", "max_tokens": 8}
CORRECTIONS = [
    "was so good that I would see it again with all of my friends",
    "bored everybody in the room until the lights came on at last",
    "has three actors who carry a thin plot to its very happy end",
    "looks cheap but its jokes are quick and most of them are new",
]


@pytest.fixture(scope="module")
def champions(tiny: tuple[Project, str], tmp_path_factory: pytest.TempPathFactory) -> Project:
    """PPO is version 1, DPO version 2 and the champion. On random models nobody wins, so the gate asks for nothing."""
    project = tiny[0].copy(tmp_path_factory.mktemp("serving") / "project")
    margins = "gate.margins={win_rate: 0.5, repetition: 1, truncated_share: 1}"
    project.rlhf("run", "-S", "gate.min_win_rate=0", "-S", margins, "-S", "gate.policy=ppo")
    assert "promoted" in project.rlhf("retrain")
    project.rlhf("run", "-S", "gate.policy=dpo")
    assert "promoted" in project.rlhf("retrain")
    return project


class Server:
    """A running `rlhf serve` and its address."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process, printed = process, ""
        assert process.stdout
        while "http://" not in printed:
            line = process.stdout.readline()
            assert line, printed
            printed += line
        self.client = httpx.Client(
            base_url=printed.split("http://")[1].split("/v1")[0].join(["http://", ""]), timeout=PATIENCE
        )

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return self.client.post(f"/v1/{path}", json=body)

    def answer(self, **more: Any) -> dict[str, Any]:
        reply = self.post("completions", ASK | more)
        assert reply.status_code == 200, reply.text
        return dict(reply.json())


@contextmanager
def serving(project: Project, *words: str) -> Iterator[Server]:
    process = project.start("serve", *words, "--port", "0")
    try:
        yield Server(process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)
        if process.stdout:
            process.stdout.close()


def hammer(server: Server, done: Callable[[], bool]) -> list[tuple[float, str]]:
    """Let clients ask until `done`; (time, version) of each answer, each of which must be one."""

    def ask(number: int) -> list[tuple[float, str]]:
        found = []
        while not done():
            found.append((time.monotonic(), server.answer(user=f"user{number}")["model"]))
        return found

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as clients:
        return [pair for found in clients.map(ask, range(CLIENTS)) for pair in found]


def rows(project: Project, name: str) -> list[dict[str, Any]]:
    file = project.root / "data" / "feedback" / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_a_switch_of_the_champion_drops_no_request(champions: Project) -> None:
    switched: list[float] = []
    with serving(champions, "--refresh", "0.2") as server:

        def done() -> bool:
            if server.client.get("/health").json()["served"] == {"champion": 1} and not switched:
                switched.append(time.monotonic())
            return bool(switched) and time.monotonic() > switched[0] + 2

        with concurrent.futures.ThreadPoolExecutor(1) as person:
            undone = person.submit(champions.command, sys.executable, "-m", "flows.cli.main", "rollback")
            answers = hammer(server, done)
            undone.result()
    assert {version for _, version in answers} == {"1", "2"}
    assert {version for at, version in answers if at > switched[0]} == {"1"}
    champions.rlhf("promote", "2", "--reason", "as before")


def test_a_terminated_server_answers_first_what_it_was_asked(champions: Project) -> None:
    with serving(champions) as server, concurrent.futures.ThreadPoolExecutor(1) as client:
        asked = client.submit(server.answer, max_tokens=450, temperature=0)
        wait_for(lambda: server.client.get("/health").json()["active"] == 1 or asked.done())
        server.process.send_signal(signal.SIGTERM)
        assert asked.result()["usage"]["completion_tokens"] > 0
        server.process.wait(PATIENCE)


def test_acknowledged_feedback_survives_a_kill_and_an_mlflow_that_is_away(champions: Project) -> None:
    database = sqlite3.connect(champions.root / "mlflow.db", isolation_level=None)
    with serving(champions, "--refresh", "3600") as server:
        database.execute("begin exclusive")
        ids = [server.answer(user="ann")["id"] for _ in range(4)]
        given = [{"thumb": "up"}, {"rating": -0.5}, {"correction": "was good"}, {"rejected": ids[0]}]
        for answer_id, item in zip(ids, given, strict=True):
            assert server.post("feedback", {"id": answer_id, "user": "ann", **item}).status_code == 200
        server.process.kill()
        server.process.wait()
    database.execute("rollback")
    output = champions.rlhf("feedback", "pull", "--announce-from", "1")
    assert len(rows(champions, "demonstrations")) == 1
    assert len(rows(champions, "ratings")) + len(rows(champions, "preferences")) >= 2
    assert "announced data of md5" in output  # the tests bring a Prefect server
    before = {file.name: file.read_bytes() for file in (champions.root / "data" / "feedback").iterdir()}
    champions.rlhf("feedback", "pull")
    assert before == {file.name: file.read_bytes() for file in (champions.root / "data" / "feedback").iterdir()}


def test_a_version_says_that_it_was_trained_on_what_was_deleted(champions: Project, tmp_path: Path) -> None:
    project = champions.copy(tmp_path / "project")
    with serving(project) as server:
        for number, text in enumerate(CORRECTIONS):
            answer = server.answer(user="ann", prompt=f"the film {number}")
            server.post("feedback", {"id": answer["id"], "user": "ann", "correction": text})
    project.rlhf("feedback", "pull")
    assert len(rows(project, "demonstrations")) >= len(CORRECTIONS)
    source = {"name": "feedback", "kind": "local", "row_type": "demonstrations"}
    source["id"] = "data/feedback/demonstrations.jsonl"
    given = YAML(typ="safe").load(project.root / "params.yaml")["collect"]["sources"]
    sources = json.dumps([*given, source])
    project.rlhf("run", "-S", f"collect.sources={sources}")
    project.rlhf("retrain")
    output = project.rlhf("feedback", "delete", "ann")
    assert "version 3 was trained on" in output
    assert rows(project, "demonstrations") == []
    assert "after this version was trained on it" in project.rlhf("lineage", "3")
    assert "after this version was trained on it" not in project.rlhf("lineage", "2")


def test_what_cannot_be_served_is_refused(champions: Project, tmp_path: Path) -> None:
    project = champions.copy(tmp_path / "project")
    assert "no version '9'" in project.rlhf("serve", "9", expect=1)
    assert "make a key first" in project.rlhf("serve", "--host", "0.0.0.0", expect=1)
    assert "write a version and a share" in project.rlhf("serve", "--canary", "challenger", expect=1)
    with serving(project) as server:
        port = str(server.client.base_url.port)
        assert "cannot listen on 127.0.0.1" in project.rlhf("serve", "--port", port, expect=1)
    shutil.rmtree(project.root / ".dvc" / "cache")
    assert "neither the DVC cache nor a DVC remote has" in project.rlhf("serve", expect=1)
    assert "neither the DVC cache nor a DVC remote has" in project.rlhf("promote", "1", expect=1)
