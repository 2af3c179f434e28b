"""Generation for many clients with one model, on a thread of its own.

Requests that wait together form a batch. Several batches take turns, a token each, so that nobody waits for the end of
another's answer. Sampling is plain as in training, and decoded by the same code.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from tasks.core.errors import RLHFError
from tasks.models.loading import device, pad_ids
from tasks.rl.decoding import Decoder, sample_tokens

__all__ = ["Engine", "Job", "OverloadError", "Token"]

MAX_WAITING = 256  # jobs; one more is refused
MAX_ROWS = 64  # jobs that are generated for at once
POLL_SECONDS = 0.2


Finish = Literal["stop", "length"] | None


class OverloadError(RLHFError):
    """As many requests wait as may."""


class Token(NamedTuple):
    """A token, its log-probability at the job's temperature (at 1 for temperature 0), and why it is the last."""

    id: int
    logprob: float
    finish: Finish


@dataclass(eq=False)
class Job:
    """A prompt to continue. `emit` gets each token, or the error that ended the job, on the engine's thread."""

    ids: Sequence[int]
    max_tokens: int
    temperature: float  # 0: the most probable token
    seed: int
    emit: Callable[[Token | Exception], None]
    forced: Sequence[int] = ()  # tokens to score in place of sampled ones
    cancelled: bool = False
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)


class Engine:
    """One model and the jobs that wait for it."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._waiting: queue.Queue[Job] = queue.Queue(MAX_WAITING)
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    @property
    def waiting(self) -> int:
        """How many jobs have not begun."""
        return self._waiting.qsize()

    def submit(self, job: Job) -> None:
        """Queue a job; `OverloadError` where too many wait."""
        try:
            self._waiting.put_nowait(job)
        except queue.Full:
            raise OverloadError(f"{MAX_WAITING} requests wait already: try again in a moment") from None

    def close(self) -> None:
        """End the thread once all submitted jobs are done."""
        self._closed.set()

    def score(self, ids: Sequence[int], tokens: Sequence[int], temperature: float) -> list[float]:
        """Log-probabilities of given response tokens, computed as those of sampled ones."""
        found: queue.SimpleQueue[Token | Exception] = queue.SimpleQueue()
        self.submit(Job(ids, len(tokens), temperature, 0, found.put, forced=tokens))
        scored = [found.get() for _ in tokens]
        if error := next((item for item in scored if isinstance(item, Exception)), None):
            raise error
        return [item.logprob for item in scored if isinstance(item, Token)]

    def _run(self) -> None:
        batches: list[_Batch] = []
        while batches or not (self._closed.is_set() and self._waiting.empty()):
            room = MAX_ROWS - sum(batch.rows for batch in batches)
            if jobs := self._take(room, wait=not batches):
                batches.append(_Batch(self.model, self.tokenizer, jobs))
            batches = [batch for batch in batches if batch.step()]

    def _take(self, most: int, *, wait: bool) -> list[Job]:
        jobs: list[Job] = []
        try:
            while len(jobs) < most:
                job = self._waiting.get(block=wait and not jobs, timeout=POLL_SECONDS)
                jobs += [] if job.cancelled else [job]
        except queue.Empty:
            pass
        return jobs


class _Batch:
    """Jobs that began together."""

    def __init__(self, model: Any, tokenizer: Any, jobs: list[Job]) -> None:
        self._model, self._tokenizer, self._jobs = model, tokenizer, jobs
        self._decoder: Decoder | None = None
        self._steps, self.rows = 0, len(jobs)

    def step(self) -> bool:
        """Generate a token of every job; return whether one goes on."""
        try:
            return self._step()
        except Exception as error:  # such as one for lack of memory: whoever waits must hear of it
            for job in self._jobs:
                job.emit(error)
            return False

    @torch.no_grad()
    def _step(self) -> bool:
        if self._decoder is None:
            ids, mask = pad_ids([job.ids for job in self._jobs], self._tokenizer.pad_token_id, side="left")
            longest = max(job.max_tokens for job in self._jobs)
            self._decoder = Decoder(self._model, None, ids.to(device()), mask.to(device()), 1, longest)
        jobs = [self._jobs[row] for row in self._decoder.rows.tolist()]
        token, logprob = self._choose(jobs, self._decoder.logits)
        unfinished = []
        for position, (job, chosen, value) in enumerate(zip(jobs, token.tolist(), logprob.tolist(), strict=True)):
            last = self._steps + 1 == job.max_tokens
            finish: Finish = "stop" if chosen == self._tokenizer.eos_token_id else "length" if last else None
            if not job.cancelled:
                job.emit(Token(chosen, value, finish))
                unfinished += [] if finish else [position]
        self._steps, self.rows = self._steps + 1, len(unfinished)
        if unfinished:
            self._decoder.feed(token, torch.tensor(unfinished, device=token.device))
        return bool(unfinished)

    def _choose(self, jobs: Sequence[Job], logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token and log-probability of each job [B], by a random number of the job's own; logits are [B, V]."""
        scaled = logits / logits.new_tensor([job.temperature or 1.0 for job in jobs]).unsqueeze(1)
        uniform = torch.cat([torch.rand(1, generator=job.generator) for job in jobs])
        token, _ = sample_tokens(scaled, 1.0, uniform.to(logits.device))
        for position, job in enumerate(jobs):
            if job.forced:
                token[position] = job.forced[self._steps]
            elif job.temperature == 0:
                token[position] = logits[position].argmax()
        return token, torch.log_softmax(scaled, -1).gather(1, token.unsqueeze(1)).squeeze(1)
