"""A server that speaks as much of OpenAI's chat completions as a judge needs, on a port of its own."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKENS = 100
"""What each answer costs, by this server's count."""


@dataclass
class Chat:
    """What the server was asked, and what it is to do."""

    say: Callable[[str], str | None]
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    """The requests that were answered."""
    keys: list[str | None] = field(default_factory=list)
    refuse: list[int] = field(default_factory=list)
    """Statuses for the next requests, before any is answered."""
    fails_after: int | None = None
    """From so many answers on there is only status 500."""
    counts: bool = True
    page: bool = False
    """Answers with a page for people."""

    def questions(self) -> list[str]:
        return [request["messages"][0]["content"] for request in self.asked]


def shown(question: str) -> tuple[str, str]:
    """The two responses in a question."""
    found = re.search(r"<response_A>\n(.*)\n</response_A>\n<response_B>\n(.*)\n</response_B>", question, re.DOTALL)
    assert found, question
    return found[1], found[2]


def longer(question: str) -> str:
    """The judge that prefers the longer text."""
    first, second = (len(text) for text in shown(question))
    return "A" if first > second else "B" if second > first else "tie"


@contextmanager
def serving(say: Callable[[str], str | None]) -> Iterator[Chat]:
    chat = Chat(say)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            chat.keys.append(self.headers["Authorization"])
            status = self._status()
            if status != 200:
                self._send(status, {"error": {"message": f"no: {self.headers['Authorization']}", "code": status}})
                return
            chat.asked.append(request)
            message = {"role": "assistant", "content": chat.say(request["messages"][0]["content"])}
            completion = {"id": "1", "object": "chat.completion", "created": 0, "model": f"{request['model']}-0613"}
            completion["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
            if chat.counts:
                completion["usage"] = {"prompt_tokens": TOKENS - 1, "completion_tokens": 1, "total_tokens": TOKENS}
            self._send(200, completion)

        def _status(self) -> int:
            if self.path != "/v1/chat/completions":
                return 404
            if chat.refuse:
                return chat.refuse.pop(0)
            return 200 if chat.fails_after is None or len(chat.asked) < chat.fails_after else 500

        def _send(self, status: int, content: object) -> None:
            body = b"<p>Welcome</p>" if chat.page else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if chat.page else "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    chat.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield chat
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
