"""The judges of pairs: a model behind any OpenAI-compatible endpoint, and the pipeline's own base model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tasks.core.errors import ConfigError, ModelError, RLHFError, SourceError
from tasks.core.models import load_reference, load_tokenizer
from tasks.core.paths import state_dir
from tasks.core.sections.judge import JudgeParams
from tasks.evals.answers import AnswerBook, key_of
from tasks.evals.pairwise import PairJudge, Reply
from tasks.rl.rollout import pad_left, position_ids

if TYPE_CHECKING:
    import openai

__all__ = ["EndpointJudge", "LocalJudge", "load_judge"]

ANSWER_TOKENS = 16
RETRIES = 4
TIMEOUT = 120.0
"""Seconds; a large model on a CPU takes its time."""

LEAD = "The better response is"


def load_judge(params: JudgeParams, base_model: Path, *, batch_size: int) -> PairJudge:
    """The judge that params name; what an endpoint answers is kept in the project's state folder.

    Raises:
        DataError: what is kept there is damaged.
        ModelError: the base model's folder is incomplete.
    """
    if params.kind == "local":
        return LocalJudge(base_model, batch_size=batch_size)
    return EndpointJudge(params, AnswerBook(state_dir() / "judge" / "answers.jsonl"))


class EndpointJudge:
    """Asks a server question by question, and never twice; the library waits and asks again on 429 and 5xx."""

    def __init__(self, params: JudgeParams, book: AnswerBook) -> None:
        self._params, self._book = params, book
        self.who = {"kind": "endpoint", "model": params.model, "base_url": params.base_url}

    def ask(self, questions: Sequence[str]) -> list[Reply]:
        """An answer to each.

        Raises:
            ConfigError: the package openai is missing, or the answers would take more than the budget; those that
                were given are kept.
            SourceError: the server is not there, or refuses.
        """
        requests = [self._request(text) for text in questions]
        keys = [key_of(self.who, request) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._book}
        if missing:
            self._fetch(missing)
        return [self._book[key] for key in keys]

    def _request(self, text: str) -> dict[str, Any]:
        """Everything that the answer may depend on; `max_tokens` by the name that every server knows."""
        message = {"role": "user", "content": text}
        return {"model": self._params.model, "messages": [message], "temperature": 0, "max_tokens": ANSWER_TOKENS}

    def _fetch(self, missing: Mapping[str, dict[str, Any]]) -> None:
        if len(missing) > self._params.max_requests:
            raise ConfigError(
                f"the judge would be asked {len(missing)} questions, evaluate.judge.max_requests allows "
                f"{self._params.max_requests}; nothing was asked: raise it, or lower evaluate.judge.prompts"
            )
        spent = 0
        with self._client() as client:
            for number, (key, request) in enumerate(missing.items()):
                if spent >= self._params.max_tokens:
                    raise ConfigError(
                        f"{number} answers of the judge took {spent} tokens, evaluate.judge.max_tokens allows "
                        f"{self._params.max_tokens}; {len(missing) - number} are missing: run again to go on from "
                        "here, the answers are kept, or raise it"
                    )
                reply = self._reply(client, request)
                self._book.add(key, self.who, reply)
                spent += reply.tokens

    def _client(self) -> openai.OpenAI:
        try:
            import openai
        except ImportError as error:
            raise ConfigError(
                "evaluate.judge.kind is endpoint, which needs the package openai: pip install -e '.[judge]'"
            ) from error
        key = os.environ.get("OPENAI_API_KEY") or "none"  # a server of one's own wants none, the library does
        return openai.OpenAI(base_url=self._params.base_url, api_key=key, max_retries=RETRIES, timeout=TIMEOUT)

    def _reply(self, client: openai.OpenAI, request: dict[str, Any]) -> Reply:
        import openai

        try:
            completion: Any = client.chat.completions.create(**request)
        except openai.APIError as error:
            raise self._refusal(error) from None  # what a server says about a key may hold the key
        if not getattr(completion, "choices", None):  # a page instead of JSON comes as a string
            raise SourceError(
                f"{self._params.base_url} answers, but not as an OpenAI-compatible server: check base_url"
            )
        text = completion.choices[0].message.content or ""
        asked = request["messages"][0]["content"]
        # A server that counts nothing is counted against the budget at the most it can be: a token for each byte.
        tokens = completion.usage.total_tokens if completion.usage else len((asked + text).encode())
        return Reply(text=text, model=completion.model or self._params.model, tokens=tokens)

    def _refusal(self, error: openai.APIError) -> RLHFError:
        where, status = f"the judge at {self._params.base_url}", getattr(error, "status_code", None)
        kept = "; answers so far are kept, run again to go on"
        if status in (401, 403):
            return SourceError(f"{where} refuses the key (HTTP {status}): set OPENAI_API_KEY in the environment")
        if status == 404:
            return SourceError(f"{where} knows no model {self._params.model!r}, or base_url is wrong (HTTP 404)")
        if status is None:
            return SourceError(f"{where} does not answer ({error.message}): is the server running?{kept}")
        said = error.message.replace(os.environ.get("OPENAI_API_KEY") or "\0", "…")[:300]
        return SourceError(f"{where} fails with HTTP {status}: {said}{kept}")


class LocalJudge:
    """The base model; it answers with the letter that it finds likelier as the next word."""

    def __init__(self, base_model: Path, *, batch_size: int) -> None:
        """Load it.

        Raises:
            ModelError: the folder is incomplete, or the tokenizer has no letters.
        """
        self.who = {"kind": "local", "model": "base_model", "base_url": ""}
        self._tokenizer: Any = load_tokenizer(base_model)
        self._model: Any = load_reference(base_model, None)
        self._batch_size = batch_size
        self._space, self._letters = _letters(self._tokenizer)

    def ask(self, questions: Sequence[str]) -> list[Reply]:
        """An answer to each, `A: 0.5731`: the letter and its probability beside that of the other one."""
        rows = [self._ids(text) for text in questions]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        replies: dict[int, Reply] = {}
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            shares = self._shares([rows[row] for row in batch])
            replies |= {row: self._reply(share, len(rows[row])) for row, share in zip(batch, shares, strict=True)}
        return [replies[row] for row in range(len(rows))]

    def _ids(self, text: str) -> list[int]:
        chat = bool(self._tokenizer.chat_template)
        if chat:
            message = [{"role": "user", "content": text}]
            text = self._tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self._tokenizer(text + ("" if chat else "\n") + LEAD, add_special_tokens=not chat).input_ids
        return ids + self._space

    @torch.no_grad()
    def _shares(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """P(A) / (P(A) + P(B)) after each row."""
        where = self._model.device
        ids, mask = (tensor.to(where) for tensor in pad_left(rows, self._tokenizer.pad_token_id))
        logits = self._model(
            input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask), logits_to_keep=1
        ).logits[:, -1, self._letters]
        shares: list[float] = logits.float().softmax(-1)[:, 0].tolist()
        return shares

    def _reply(self, share: float, tokens: int) -> Reply:
        letter, probability = ("A", share) if share > 0.5 else ("B", 1 - share)
        text = "tie" if share == 0.5 else f"{letter}: {probability:.4f}"
        return Reply(text=text, model=self.who["model"], tokens=tokens + 1)


def _letters(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that " A" and " B" begin with together, and the two in which they differ."""
    one, other = (tokenizer(text, add_special_tokens=False).input_ids for text in (" A", " B"))
    same = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]
    if len(same) == min(len(one), len(other)):
        raise ModelError(
            f"the base model's tokenizer cannot tell A from B ({one}, {other}): set evaluate.judge to null"
        )
    return same, [one[len(same)], other[len(same)]]
