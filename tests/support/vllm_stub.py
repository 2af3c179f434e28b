"""A server that speaks as much of vLLM's protocol as the sampler needs, and computes with a model of its own."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from peft import PeftModel

from tests.conftest import EOS


@dataclass
class Stub:
    """What the server holds, was asked, and does wrong.

    Attributes:
        model: the base model, with the adapters that were loaded.
        temperature_factor: it samples at so many times the temperature that was asked for.
        shift: its log-probabilities are those of so many tokens earlier.
        stale: from now on it takes no new adapter, and answers with the last one.
        fails: it answers so many next completions with status 500.
        plain: it answers without token ids, as other servers do.
    """

    model: Any
    url: str = ""
    loaded: list[str] = field(default_factory=list)
    unloaded: list[str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    temperature_factor: float = 1.0
    shift: int = 0
    stale: bool = False
    fails: int = 0
    plain: bool = False
    lock: Any = field(default_factory=threading.Lock)

    def answer(self, path: str, request: dict[str, Any]) -> tuple[int, Any]:
        with self.lock:
            if path == "/v1/load_lora_adapter":
                return self._load(request["lora_name"], request["lora_path"])
            if path == "/v1/unload_lora_adapter":
                self.unloaded.append(request["lora_name"])
                return 200, "ok"
            self.requests.append(request)
            if self.fails:
                self.fails -= 1
                return 500, {"error": {"message": "engine dead"}}
            if request["model"] not in self.loaded:
                return 404, {"error": {"message": f"no model {request['model']}"}}
            return 200, self._complete(request)

    def _load(self, name: str, path: str) -> tuple[int, Any]:
        if name in self.loaded:
            return 400, {"error": {"message": f"{name} is loaded"}}
        if not (self.stale and self.loaded):
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(path, name)
            else:
                self.model = PeftModel.from_pretrained(self.model, path, adapter_name=name)
            self.model.set_adapter(name)
        self.loaded.append(name)
        return 200, "ok"

    @torch.no_grad()
    def _complete(self, request: dict[str, Any]) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(request["seed"])
        ids, tokens, logprobs = list(request["prompt"]), [], []
        for _ in range(request["max_tokens"]):
            logits = self.model(torch.tensor([ids])).logits[0, -1]
            own = torch.log_softmax(logits / (request["temperature"] * self.temperature_factor), -1)
            token = int(torch.multinomial(own.exp(), 1, generator=generator))
            ids, tokens, logprobs = [*ids, token], [*tokens, token], [*logprobs, float(own[token])]
            if token == EOS:
                break
        shifted = logprobs[-self.shift :] + logprobs[: -self.shift] if self.shift else logprobs
        choice = {"text": "", "token_ids": tokens, "logprobs": {"token_logprobs": shifted}}
        return {"choices": [{"text": ""} if self.plain else choice]}


@contextmanager
def serving(model: Any) -> Iterator[Stub]:
    """Serve on a port of its own; the model is the base, without adapters."""
    stub = Stub(model)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, "")

        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(*stub.answer(self.path, content))

        def _send(self, status: int, content: Any) -> None:
            body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
