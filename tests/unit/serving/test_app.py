"""What clients get, what is recorded, and what is refused, by a server in this process."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tasks.serving.app import Recording
from tests.unit.serving.conftest import Server

COMPLETE, CHAT, FEEDBACK = "/v1/completions", "/v1/chat/completions", "/v1/feedback"
ASK: dict[str, Any] = {"prompt": "abc", "seed": 1, "max_tokens": 12}


def test_a_completion_and_its_record(server: Server) -> None:
    (reply,) = server.run((COMPLETE, {**ASK, "logprobs": 1, "user": "ann"}))
    body = reply.json()
    (choice,) = body["choices"]
    assert (reply.status_code, body["object"], body["model"]) == (200, "text_completion", "1")
    assert len(choice["logprobs"]["token_logprobs"]) == body["usage"]["completion_tokens"]
    assert all(value < 0 for value in choice["logprobs"]["token_logprobs"])
    assert body["usage"]["prompt_tokens"] == 3
    ((name, row, durable),) = server.journal.rows
    assert (name, durable, row["id"], row["version"]) == ("log_answer", False, body["id"], 1)
    assert (row["prompt"], row["answer"], row["input_tokens"]) == ("abc", choice["text"], 3)
    assert row["user"].startswith("person-"), "not the name itself"


def test_equal_seeds_give_equal_answers_and_no_seed_others(server: Server) -> None:
    replies = server.run(*[(COMPLETE, ASK)] * 2, *[(COMPLETE, {"prompt": "abc", "max_tokens": 12})] * 4)
    texts = [reply.json()["choices"][0]["text"] for reply in replies]
    assert texts[0] == texts[1]
    assert len(set(texts[2:])) > 1


def test_a_stream_is_the_answer_in_pieces(server: Server) -> None:
    whole, stream = server.run((COMPLETE, ASK), (COMPLETE, {**ASK, "stream": True}))
    events = [line.removeprefix("data: ") for line in stream.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole.json()["choices"][0]["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["usage"] == whole.json()["usage"]
    assert len(chunks) > 3
    assert len(server.journal.rows) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_text(server: Server, stream: bool) -> None:
    (reply,) = server.run((COMPLETE, ASK))
    text = reply.json()["choices"][0]["text"]
    stop = text[3:5]
    expected = text[: text.index(stop)]
    (reply,) = server.run((COMPLETE, {**ASK, "stop": [stop, "??"], "stream": stream}))
    chunks = [json.loads(line[6:]) for line in reply.text.split("\n\n")[:-2]] if stream else [reply.json()]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_chat_uses_the_template(server: Server) -> None:
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hey"}]
    (chat,) = server.run((CHAT, {"messages": messages, "seed": 1, "max_completion_tokens": 5, "logprobs": True}))
    (plain,) = server.run((COMPLETE, {"prompt": "s be kind u hey ", "seed": 1, "max_tokens": 5}))
    choice = chat.json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": plain.json()["choices"][0]["text"]}
    assert len(choice["logprobs"]["content"]) == chat.json()["usage"]["completion_tokens"]
    assert chat.json()["object"] == "chat.completion"


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (COMPLETE, {"prompt": ""}, 400, "prompt: String should have at least 1 character"),
        (COMPLETE, {"prompt": "a", "n": 2}, 400, "n: Input should be less than or equal to 1"),
        (COMPLETE, {"prompt": "a", "top_k": 5}, 400, "top_k: Extra inputs are not permitted"),
        (COMPLETE, {"prompt": "a" * 70}, 400, "a prompt of 70 tokens with max_tokens 1 does not fit"),
        (COMPLETE, {"prompt": "a", "max_tokens": 64}, 400, "the model reads 1 to 64 tokens"),
        (COMPLETE, {"prompt": "a" * 2**20}, 413, "larger than 1048576 bytes"),
        (COMPLETE, {"prompt": "a", "model": "gpt"}, 404, "no model 'gpt'; there are 1, champion"),
        (CHAT, {"messages": []}, 400, "messages: List should have at least 1 item"),
        (FEEDBACK, {"id": "tr-" + "0" * 32, "thumb": "up"}, 404, "no answer has the id"),
        (FEEDBACK, {"id": "x"}, 400, "exactly one of thumb, rating, correction and rejected"),
        (FEEDBACK, {"id": "x", "rating": 3}, 400, "rating: Input should be less than or equal to 1"),
    ],
)
def test_bad_requests_say_what_is_wrong(server: Server, path: str, body: Any, status: int, message: str) -> None:
    (reply,) = server.run((path, body))
    assert reply.status_code == status
    assert message in reply.json()["error"]["message"]
    assert server.journal.rows == []


def test_feedback_is_stored_durably_or_refused(server: Server) -> None:
    first, second = (reply.json()["id"] for reply in server.run((COMPLETE, ASK), (COMPLETE, ASK)))
    del server.journal.rows[:]
    given = [{"thumb": "down"}, {"rating": 0.5}, {"correction": "abc"}, {"rejected": second}]
    replies = server.run(*[(FEEDBACK, {"id": first, "user": "ann", **item}) for item in given])
    assert [reply.json()["status"] for reply in replies] == ["stored"] * 4
    assert all(name == "log_feedback" and durable for name, _, durable in server.journal.rows)
    stored = {str(row["kind"]): row["value"] for _, row, _ in server.journal.rows}
    assert stored == {"thumb": False, "rating": 0.5, "correction": "abc", "preferred_over": second}
    server.journal.full = True
    refused, answered = server.run((FEEDBACK, {"id": first, "thumb": "up"}), (COMPLETE, ASK))
    assert (refused.status_code, answered.status_code) == (503, 200), "answers go on without a record"


def test_a_sample_is_recorded_and_without_texts_if_so_asked(server: Server) -> None:
    server.recording = Recording(sample=0.5, content=False)
    ids = [reply.json()["id"] for reply in server.run(*[(COMPLETE, ASK)] * 40)]
    recorded = {str(row["id"]) for _, row, _ in server.journal.rows}
    assert 5 < len(recorded) < 35
    assert recorded == {item for item in ids if item.startswith("tr-")}
    assert all("prompt" not in row and "answer" not in row for _, row, _ in server.journal.rows)
    (reply,) = server.run((FEEDBACK, {"id": next(item for item in ids if item not in recorded), "thumb": "up"}))
    assert reply.status_code == 409


def test_keys_are_needed_and_counted(tmp_path: Path) -> None:
    server = Server(tmp_path, keys=True, rate=3)
    key = server.access.add("app")
    assert key not in (tmp_path / "access.json").read_text()
    assert (tmp_path / "access.json").stat().st_mode & 0o077 == 0
    (reply,) = server.run((COMPLETE, ASK), headers={"Authorization": f"Bearer {key}x"})
    assert reply.status_code == 401
    replies = server.run(*[(COMPLETE, ASK)] * 4, headers={"Authorization": f"Bearer {key}"})
    assert sorted(reply.status_code for reply in replies) == [200, 200, 200, 429]
    limited = next(reply for reply in replies if reply.status_code == 429)
    assert 0 < int(limited.headers["Retry-After"]) <= 60


def test_without_keys_another_name_of_this_machine_is_refused(server: Server) -> None:
    (reply,) = server.run((COMPLETE, ASK), headers={"Host": "evil.example"})
    assert reply.status_code == 400


def test_without_a_champion_answers_stop_and_say_why(server: Server) -> None:
    assert server.run(("/health", {}))[0].json()["served"] == {"champion": 1}
    server.aliases = {}
    health, reply = server.run(("/health", {}), (COMPLETE, ASK))
    assert (health.status_code, reply.status_code) == (503, 503)
    assert "no version 'champion'" in reply.json()["error"]["message"]


def test_a_new_champion_takes_over_and_a_broken_one_does_not(server: Server) -> None:
    assert server.run((COMPLETE, ASK))[0].json()["model"] == "1"
    server.aliases["champion"] = 2
    assert server.run((COMPLETE, ASK))[0].json()["model"] == "2"
    server.broken, server.aliases["champion"] = {3}, 3
    reply, health = server.run((COMPLETE, ASK), ("/health", {}))
    assert reply.json()["model"] == "2"
    assert "neither the DVC cache nor a DVC remote has version 3" in health.json()["problems"]["champion"]
    server.aliases["champion"] = 2
    assert server.run(("/health", {}))[0].json()["problems"] == {}
    server.broken, server.aliases["champion"] = set(), 3
    assert server.run((COMPLETE, ASK))[0].json()["model"] == "3", "it is tried again once it could be had"


def test_a_share_of_the_users_stays_with_the_canary(tmp_path: Path) -> None:
    server = Server(tmp_path, canary=0.3)
    users = [f"user{number}" for number in range(50)]
    asked = [(COMPLETE, {**ASK, "max_tokens": 1, "user": user}) for user in users]
    first, second = ([reply.json()["model"] for reply in server.run(*asked)] for _ in range(2))
    assert first == second
    assert 5 <= first.count("2") <= 25
    named, anonymous = server.run((COMPLETE, {**ASK, "model": "challenger"}), (COMPLETE, ASK))
    assert (named.json()["model"], anonymous.json()["model"]) == ("2", "1")


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_frees_the_engine(server: Server, stream: bool) -> None:
    """By the protocol of web servers itself: the client is gone after its request."""
    sent: list[Any] = []

    async def ask() -> None:
        await server.versions.refresh()
        body = json.dumps({**ASK, "temperature": 0, "max_tokens": 60, "stream": stream}).encode()
        incoming = [{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}]

        async def receive() -> Any:
            return incoming.pop(0) if incoming else await asyncio.sleep(60)

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": COMPLETE, "headers": headers, "query_string": b""}
        scope |= {"asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "server": ("127.0.0.1", 80)}
        await server.app()({**scope, "raw_path": COMPLETE.encode(), "scheme": "http", "root_path": ""}, receive, send)
        await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(ask(), 60))
    (reply,) = server.run((COMPLETE, ASK))
    assert reply.status_code == 200
    assert [row["finish_reason"] for _, row, _ in server.journal.rows][:1] == ["aborted"]


def test_the_models_are_listed(server: Server) -> None:
    (reply,) = server.run(("/v1/models", {}))
    assert [item["id"] for item in reply.json()["data"]] == ["champion", "1"]
    assert isinstance(reply, httpx.Response)
