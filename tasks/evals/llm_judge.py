"""LLM judges of pairs: a server behind an endpoint, whose replies are kept on disk, or the base model itself."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tasks.core.errors import ConfigError, ModelError, SourceError
from tasks.core.paths import state_dir
from tasks.core.rows import Row, read_rows
from tasks.evals.pairwise import Cost, PairJudge, Reply
from tasks.models.encoding import encode_chat, encode_prompt, encode_text
from tasks.models.loading import load_reference, load_tokenizer, pad_ids, position_ids

if TYPE_CHECKING:
    import openai

    from tasks.config.evaluation import JudgeParams

__all__ = ["EndpointJudge", "JudgeCache", "LocalJudge", "load_judge", "request_key"]

ANSWER_TOKENS = 16
RETRIES = 4
TIMEOUT = 120.0
"""Seconds; a large model on a CPU is slow."""

ANSWER_PREFIX = "The better response is"


def load_judge(params: JudgeParams, base_model: Path, *, batch_size: int) -> PairJudge:
    """Load the judge of params; replies of an endpoint are cached in the project's state folder."""
    if params.kind == "local":
        return LocalJudge(base_model, batch_size=batch_size)
    return EndpointJudge(params, JudgeCache(state_dir() / "judge" / "answers.jsonl"))


class CacheEntry(Row):
    """One line of the cache; `id` is the hash of the judge and the request."""

    judge: dict[str, str]
    reply: Reply


class JudgeCache(dict[str, Reply]):
    """Append-only file of replies, so that no request is paid for twice; a killed run loses one reply at most."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        complete_bytes = path.read_bytes().rfind(b"\n") + 1
        os.truncate(path, complete_bytes)  # drops an incomplete last line, which a killed run did not finish
        super().__init__({entry.id: entry.reply for entry in read_rows(path, CacheEntry)} if complete_bytes else {})

    def add(self, key: str, judge_id: Mapping[str, str], reply: Reply) -> None:
        """Append the reply at once, before the next request."""
        self[key] = reply
        entry = CacheEntry(id=key, judge=dict(judge_id), reply=reply)
        with self._path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(entry.model_dump_json() + "\n")


def request_key(judge_id: Mapping[str, str], request: Mapping[str, object]) -> str:
    """Hash of the judge and the complete request."""
    return hashlib.sha256(json.dumps([judge_id, request], sort_keys=True).encode()).hexdigest()


class EndpointJudge:
    """Judge behind an endpoint, one request per question, cached; the client retries on 429 and 5xx."""

    def __init__(self, params: JudgeParams, cache: JudgeCache) -> None:
        self._params, self._cache, self.cost = params, cache, Cost()
        self.judge_id = {"kind": "endpoint", "model": params.model, "base_url": params.base_url}

    def judge(self, questions: Sequence[str]) -> list[Reply]:
        """Reply to each question.

        Raises:
            ConfigError: the package openai is missing, or the answers would take more than the budget; those that
                were given are kept.
            SourceError: the server is not there, or refuses.
        """
        requests = [self._request(text) for text in questions]
        keys = [request_key(self.judge_id, request) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._cache}
        if missing:
            self._fetch(missing)
        return [self._cache[key] for key in keys]

    def _request(self, text: str) -> dict[str, Any]:
        """Build the request, which is also the cache key; every server knows the name `max_tokens`."""
        message = {"role": "user", "content": text}
        return {"model": self._params.model, "messages": [message], "temperature": 0, "max_tokens": ANSWER_TOKENS}

    def _fetch(self, missing: Mapping[str, dict[str, Any]]) -> None:
        if len(missing) > self._params.max_requests:
            raise ConfigError(
                f"the judge would be asked {len(missing)} questions, evaluate.llm_judge.max_requests allows "
                f"{self._params.max_requests}; nothing was asked: raise it, or lower evaluate.llm_judge.prompts"
            )
        tokens_used = 0
        with self._client() as client:
            for number, (key, request) in enumerate(missing.items()):
                if tokens_used >= self._params.max_tokens:
                    raise ConfigError(
                        f"{number} answers of the judge took {tokens_used} tokens, evaluate.llm_judge.max_tokens "
                        f"allows {self._params.max_tokens}; {len(missing) - number} are missing: run again to go on "
                        "from here, the answers are kept, or raise it"
                    )
                reply = self._reply(client, request)
                self._cache.add(key, self.judge_id, reply)
                self.cost.add(reply)
                tokens_used += reply.tokens

    def _client(self) -> openai.OpenAI:
        try:
            import openai
        except ImportError as error:
            raise ConfigError(
                "evaluate.llm_judge.kind is endpoint, which needs the package openai: pip install -e '.[judge]'"
            ) from error
        key = os.environ.get("OPENAI_API_KEY") or "none"  # a self-hosted server needs no key, but the library does
        return openai.OpenAI(base_url=self._params.base_url, api_key=key, max_retries=RETRIES, timeout=TIMEOUT)

    def _reply(self, client: openai.OpenAI, request: dict[str, Any]) -> Reply:
        import openai

        try:
            completion: Any = client.chat.completions.create(**request)
        except openai.APIError as error:
            raise self._api_error(error) from None  # what a server says about a key may hold the key
        if not getattr(completion, "choices", None):  # a page instead of JSON comes as a string
            url = self._params.base_url
            raise SourceError(f"{url} answers, but not as an OpenAI-compatible server: check base_url")
        text = completion.choices[0].message.content or ""
        question = request["messages"][0]["content"]
        # A server that counts nothing is counted against the budget at the most it can be: a token for each byte.
        tokens = completion.usage.total_tokens if completion.usage else len((question + text).encode())
        return Reply(text=text, model=completion.model or self._params.model, tokens=tokens)

    def _api_error(self, error: openai.APIError) -> SourceError:
        endpoint, status = f"the judge at {self._params.base_url}", getattr(error, "status_code", None)
        kept = "; answers so far are kept, run again to go on"
        if status in (401, 403):
            return SourceError(f"{endpoint} refuses the key (HTTP {status}): set OPENAI_API_KEY in the environment")
        if status == 404:
            return SourceError(f"{endpoint} knows no model {self._params.model!r}, or base_url is wrong (HTTP 404)")
        if status is None:
            return SourceError(f"{endpoint} does not answer ({error.message}): is the server running?{kept}")
        message = error.message.replace(os.environ.get("OPENAI_API_KEY") or "\0", "…")[:300]
        return SourceError(f"{endpoint} fails with HTTP {status}: {message}{kept}")


class LocalJudge:
    """Base model as a judge; it answers with the letter that it finds likelier as the next token.

    Raises:
        ModelError: the folder is incomplete, or the tokenizer has no letters.
    """

    def __init__(self, base_model: Path, *, batch_size: int) -> None:
        self.judge_id = {"kind": "local", "model": "base_model", "base_url": ""}
        self._tokenizer: Any = load_tokenizer(base_model)
        self._model: Any = load_reference(base_model, None)
        self._batch_size, self.cost = batch_size, Cost()
        self._prefix_ids, self._letter_ids = _letter_tokens(self._tokenizer)

    def judge(self, questions: Sequence[str]) -> list[Reply]:
        """Reply to each question, such as `A: 0.5731`: the letter and its normalised probability."""
        rows = [self._ids(text) for text in questions]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        replies: dict[int, Reply] = {}
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            probs = self._prob_a([rows[row] for row in batch])
            replies |= {row: self._reply(prob, len(rows[row])) for row, prob in zip(batch, probs, strict=True)}
        self.cost.add(*replies.values())
        return [replies[row] for row in range(len(rows))]

    def _ids(self, text: str) -> list[int]:
        if self._tokenizer.chat_template:
            question = encode_chat(self._tokenizer, text)
        else:
            question = encode_prompt(self._tokenizer, f"{text}\n")
        return [*question, *encode_text(self._tokenizer, ANSWER_PREFIX), *self._prefix_ids]

    @torch.no_grad()
    def _prob_a(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Compute P(A) / (P(A) + P(B)) after each row."""
        device = self._model.device
        ids, mask = (tensor.to(device) for tensor in pad_ids(rows, self._tokenizer.pad_token_id, side="left"))
        logits = self._model(
            input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask), logits_to_keep=1
        ).logits[:, -1, self._letter_ids]
        probs: list[float] = logits.float().softmax(-1)[:, 0].tolist()
        return probs

    def _reply(self, prob_a: float, tokens: int) -> Reply:
        letter, probability = ("A", prob_a) if prob_a > 0.5 else ("B", 1 - prob_a)
        text = "tie" if prob_a == 0.5 else f"{letter}: {probability:.4f}"
        return Reply(text=text, model=self.judge_id["model"], tokens=tokens + 1)


def _letter_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Common prefix tokens of " A" and " B", and the two tokens in which they differ."""
    a_ids, b_ids = (encode_text(tokenizer, text) for text in (" A", " B"))
    prefix = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(a_ids, b_ids, strict=False))]
    if len(prefix) == min(len(a_ids), len(b_ids)):
        raise ModelError(
            f"the base model's tokenizer cannot tell A from B ({a_ids}, {b_ids}): set evaluate.llm_judge to null"
        )
    return prefix, [a_ids[len(prefix)], b_ids[len(prefix)]]
