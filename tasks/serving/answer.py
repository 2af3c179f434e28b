"""An answer while it is generated: its text, its end, and its form in replies."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from fastapi import HTTPException

from tasks.core.errors import first_line
from tasks.models.encoding import decode_response
from tasks.serving.engine import Job, Token
from tasks.serving.protocol import ChatRequest, GenerationRequest
from tasks.serving.versions import Served

__all__ = ["Answer", "TokenLogprob"]

TokenLogprob = tuple[str, float]  # a token's text and log-probability

NOT_A_CHARACTER = "\ufffd"  # what the first tokens of a longer character decode to


@dataclass
class Answer:
    """An answer that is being generated: whole characters only, and nothing of a stop text."""

    id: str
    body: GenerationRequest
    served: Served
    prompt: str
    job: Job
    tokens: asyncio.Queue[Token | Exception]
    text: str = ""
    finish: str = ""
    count: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    started: int = field(default_factory=lambda: int(time.time() * 1000))
    _ids: list[int] = field(default_factory=list)

    def add(self, token: Token | Exception) -> tuple[str, list[TokenLogprob]]:
        """Take up a token; return the text and log-probabilities that are new."""
        if isinstance(token, HTTPException):
            raise token
        if isinstance(token, Exception):
            raise HTTPException(500, f"generation failed: {first_line(token)}") from token
        tokenizer, self.count = self.served.engine.tokenizer, self.count + 1
        self._ids += [] if token.finish == "stop" else [token.id]
        text, self.finish = decode_response(tokenizer, self.job.ids, self._ids), token.finish or ""
        found = [text.index(stop) for stop in self.body.stops if stop in text]
        if found:
            text, self.finish = text[: min(found)], "stop"
        elif not self.finish:
            text = text[: len(text) - max((len(stop) - 1 for stop in self.body.stops), default=0)]
            text = text.rstrip(NOT_A_CHARACTER)
        new, self.text = text[len(self.text) :], max(text, self.text, key=len)
        logprob = [(tokenizer.decode([token.id]), token.logprob)] if self.body.wants_logprobs else []
        self.logprobs += logprob
        return new, logprob

    def reply(self, text: str, logprobs: list[TokenLogprob], *, chunk: bool) -> dict[str, Any]:
        """The whole answer, or a chunk of it, in OpenAI's form."""
        chat = isinstance(self.body, ChatRequest)
        choice: dict[str, Any] = {"index": 0, "finish_reason": self.finish or None, "logprobs": None}
        choice |= {"delta" if chunk else "message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if self.body.wants_logprobs and chat:
            content = [{"token": token, "logprob": value, "top_logprobs": []} for token, value in logprobs]
            choice["logprobs"] = {"content": content}
        elif self.body.wants_logprobs:
            tokens, values = [token for token, _ in logprobs], [value for _, value in logprobs]
            choice["logprobs"] = {"tokens": tokens, "token_logprobs": values, "top_logprobs": None}
        kind = "chat.completion" + (".chunk" if chunk else "") if chat else "text_completion"
        reply = {"id": self.id, "object": kind, "created": self.started // 1000, "model": str(self.served.number)}
        prompt = len(self.job.ids)
        usage = {"prompt_tokens": prompt, "completion_tokens": self.count, "total_tokens": prompt + self.count}
        return {**reply, "choices": [choice], **({"usage": usage} if self.finish else {})}
