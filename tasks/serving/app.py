"""The front: checks requests, lets a version answer, records the answer, and takes feedback."""

import asyncio
import json
import random
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError

from tasks.core.errors import ConfigError, RLHFError, StageError
from tasks.core.rows import format_validation_error
from tasks.labelling.labels import pseudonym
from tasks.models.encoding import context_length, encode_prompt, encode_text
from tasks.runtime.mlflow_traces import TraceQueue
from tasks.serving.access import RECORDED, Access, AccessError
from tasks.serving.answer import Answer, TokenLogprob
from tasks.serving.engine import Job, OverloadError, Token
from tasks.serving.journal import Journal
from tasks.serving.protocol import ChatRequest, CompletionRequest, FeedbackRequest, GenerationRequest
from tasks.serving.versions import Served, Versions

__all__ = ["LOOPBACK", "Recording", "create_app"]

LOOPBACK = ("127.0.0.1", "localhost")
MAX_BODY = 2**20  # bytes
STATUS: dict[type[Exception], int] = {OverloadError: 429, ConfigError: 503, StageError: 503}


@dataclass(frozen=True)
class Recording:
    """Which share of the answers is recorded, and whether with their texts."""

    sample: float = 1.0
    content: bool = True


def create_app(
    versions: Versions, journal: Journal, access: Access, recording: Recording, *, keys: bool, refresh_seconds: float
) -> FastAPI:
    """The web application; with `keys` each request needs one, without it only loopback's names are answered."""
    front = Front(versions, journal, access, recording, keys=keys)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watcher = asyncio.create_task(front.follow_aliases(refresh_seconds))
        yield
        watcher.cancel()
        versions.close()
        await asyncio.to_thread(journal.close)

    app = FastAPI(lifespan=lifespan, openapi_url=None, title="rlhf serve")
    if not keys:  # else a page whose name resolves to this machine could ask
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))
    for path, method, action in (
        ("/health", "GET", front.health),
        ("/v1/models", "GET", front.models),
        ("/v1/completions", "POST", front.complete),
        ("/v1/chat/completions", "POST", front.chat),
        ("/v1/feedback", "POST", front.feedback),
    ):
        app.add_api_route(path, action, methods=[method], response_model=None)
    for kind in (ValidationError, HTTPException, RLHFError):
        app.add_exception_handler(kind, _refuse)
    return app


async def _refuse(_: Request, error: Exception) -> Response:
    """An error in OpenAI's form."""
    status, message = 400, str(error)
    headers = {}
    if isinstance(error, ValidationError):
        message = format_validation_error(error)
    elif isinstance(error, HTTPException):
        status, message = error.status_code, str(error.detail)
    elif isinstance(error, AccessError):
        status, headers = error.status, {"Retry-After": str(error.wait)} if error.wait else {}
    else:
        status = STATUS.get(type(error), 500)
        headers = {"Retry-After": "1"} if status == 429 else {}
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status, headers)


class Front:
    """What each address does."""

    def __init__(
        self, versions: Versions, journal: Journal, access: Access, recording: Recording, *, keys: bool
    ) -> None:
        self._versions, self._journal, self._access = versions, journal, access
        self._recording, self._keys, self._active = recording, keys, 0

    async def follow_aliases(self, seconds: float) -> None:
        """Look again and again which versions the names stand for."""
        while True:
            await asyncio.sleep(seconds)
            await self._versions.refresh()

    async def health(self) -> Response:
        """What is served; status 503 where nothing is."""
        served = {name: item.number for name, item in self._versions.served.items()}
        is_up = self._versions.name in served
        content = {
            "status": "ok" if is_up else "unavailable",
            "served": served,
            "problems": self._versions.problems,
            "active": self._active,
            "waiting": sum(item.engine.waiting for item in self._versions.served.values()),
            "journal": {"bytes": self._journal.waiting, "dropped": self._journal.dropped},
        }
        return JSONResponse(content, 200 if is_up else 503)

    async def models(self, request: Request) -> dict[str, Any]:
        """The names that a request may give as `model`."""
        self._caller(request)
        served = self._versions.served
        names = [*served, *dict.fromkeys(str(item.number) for item in served.values())]
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "rlhf"} for name in names]}

    async def complete(self, request: Request) -> Response:
        """Continue a text."""
        caller = self._caller(request)
        body = await _read(request, CompletionRequest)
        served = self._choose(body, caller)
        ids = encode_prompt(served.engine.tokenizer, body.prompt)
        return await self._answer(request, body, served, caller, body.prompt, ids)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation, in the tokenizer's chat template."""
        caller = self._caller(request)
        body = await _read(request, ChatRequest)
        body.max_tokens = body.max_completion_tokens or body.max_tokens
        served = self._choose(body, caller)
        tokenizer = served.engine.tokenizer
        if not tokenizer.chat_template:
            raise HTTPException(400, "the model's tokenizer has no chat template: use /v1/completions")
        turns = [turn.model_dump() for turn in body.messages]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return await self._answer(request, body, served, caller, prompt, encode_text(tokenizer, prompt))

    async def feedback(self, request: Request) -> dict[str, str]:
        """Store what a person says of an answer; it is on the disk when this replies."""
        caller = self._caller(request)
        body = await _read(request, FeedbackRequest)
        for given in filter(None, (body.id, body.rejected)):
            if not self._access.is_id(given):
                raise HTTPException(404, f"no answer has the id {given[:80]!r}")
            if not given.startswith(RECORDED):
                raise HTTPException(409, f"the answer {given} was not recorded (rlhf serve --sample)")
        ((kind, value),) = body.given.items()
        content = {"id": secrets.token_hex(16), "answer_id": body.id, "kind": kind, "value": value}
        content["user"] = _pseudonym(body.user, caller)
        await asyncio.to_thread(self._journal.append, TraceQueue.log_feedback, content, durable=True)
        return {"id": content["id"], "status": "stored"}

    def _caller(self, request: Request) -> str:
        """The name of the client's key; empty where none is needed."""
        return self._access.caller(request.headers.get("authorization", "")) if self._keys else ""

    def _choose(self, body: GenerationRequest, caller: str) -> Served:
        try:
            return self._versions.choose(body.model, body.user or caller)
        except ConfigError as error:
            if body.model in (None, self._versions.name):
                raise
            raise HTTPException(404, str(error)) from None

    async def _answer(
        self, request: Request, body: GenerationRequest, served: Served, caller: str, prompt: str, ids: Sequence[int]
    ) -> Response:
        room = (context_length(served.engine.model.config) or 2**31) - len(ids)
        wanted = body.max_tokens or min(served.generation.max_new_tokens, max(room, 1))
        if wanted > room or not ids:
            what = f"a prompt of {len(ids)} tokens with max_tokens {wanted}"
            raise HTTPException(400, f"{what} does not fit: the model reads 1 to {room + len(ids)} tokens")
        recorded = random.random() < self._recording.sample
        tokens: asyncio.Queue[Token | Exception] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(token: Token | Exception) -> None:
            loop.call_soon_threadsafe(tokens.put_nowait, token)

        job = Job(
            ids,
            wanted,
            served.generation.temperature if body.temperature is None else body.temperature,
            secrets.randbits(63) if body.seed is None else body.seed,
            emit,
        )
        answer = Answer(self._access.new_id(recorded=recorded), body, served, prompt, job, tokens)
        served.engine.submit(job)
        events = self._generate(answer, _pseudonym(body.user, caller) if recorded else None)
        if body.stream:
            return StreamingResponse(_sse(answer, events), media_type="text/event-stream")
        watcher = asyncio.create_task(_cancel_on_hangup(request, tokens))
        try:
            async for _ in events:
                pass
        finally:
            watcher.cancel()
        return JSONResponse(answer.reply(answer.text, answer.logprobs, chunk=False))

    async def _generate(self, answer: Answer, user: str | None) -> AsyncIterator[tuple[str, list[TokenLogprob]]]:
        """New text and log-probabilities as they come; the answer is recorded before the last of them is sent."""
        self._active += 1
        try:
            done = False
            while not done:
                new = answer.add(await answer.tokens.get())
                done = bool(answer.finish)
                if done and user:
                    self._record(answer, user)
                yield new
        finally:
            self._active -= 1
            answer.job.cancelled = True
            if not answer.finish and user:
                answer.finish = "aborted"
                self._record(answer, user)

    def _record(self, answer: Answer, user: str) -> None:
        content = {
            "id": answer.id,
            "time": answer.started,
            "latency": int(time.time() * 1000) - answer.started,
            "version": answer.served.number,
            "user": user,
            "finish_reason": answer.finish,
            "input_tokens": len(answer.job.ids),
            "output_tokens": answer.count,
        }
        if self._recording.content:
            content |= {"prompt": answer.prompt, "answer": answer.text}
        with suppress(StageError):  # the journal is full, which it counts
            self._journal.append(TraceQueue.log_answer, content, durable=False)


def _pseudonym(user: str, caller: str) -> str:
    """Of the request's user, or else of the key's name, or else of nobody in particular."""
    return pseudonym(user or caller or "anonymous")


async def _sse(answer: Answer, events: AsyncIterator[tuple[str, list[TokenLogprob]]]) -> AsyncIterator[str]:
    """Server-sent events; an error after the first of them is one more event."""
    try:
        async for text, logprobs in events:
            if text or logprobs or answer.finish:
                yield f"data: {json.dumps(answer.reply(text, logprobs, chunk=True))}\n\n"
    except Exception as error:  # the status was sent long ago
        yield f"data: {json.dumps({'error': {'message': str(error), 'type': 'server_error', 'code': 500}})}\n\n"
    yield "data: [DONE]\n\n"


async def _cancel_on_hangup(request: Request, tokens: asyncio.Queue[Token | Exception]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    tokens.put_nowait(HTTPException(499, "the client has hung up"))


async def _read(request: Request, kind: type[Any]) -> Any:
    """The body, checked."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"the request is larger than {MAX_BODY} bytes")
    return kind.model_validate_json(body)
