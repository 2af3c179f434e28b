"""Labels by a language model that reads a written constitution (RLAIF).

Source: Bai et al. 2022, "Constitutional AI: Harmlessness from AI Feedback", arXiv 2212.08073, section 4.1, where the
model that labels is shown one principle drawn at random; here it is shown the whole constitution each time, so that a
label can be explained by the file and does not depend on a draw.

Each pair is asked in both orders (see `tasks.evals.pairwise`); answers that contradict each other are no label but a
skip, which says why, and so are unclear ones.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

from sqlalchemy import select
from sqlalchemy.orm import Session

from tasks.core.errors import ConfigError, DataError
from tasks.core.sections.judge import JudgeParams
from tasks.evals.answers import AnswerBook
from tasks.evals.judges import EndpointJudge, LocalJudge
from tasks.evals.pairwise import PairJudge, Reply, Verdict, question, verdict
from tasks.labelling.labels import MODEL_NAME, Label, Question, add_label, questions
from tasks.labelling.queries import MODEL
from tasks.labelling.tables import Event

__all__ = ["Budget", "Constitution", "Cost", "CountingBook", "Labelled", "combined", "judge_of", "label_by_model"]

CONTRADICTION = "the answer changes with the order of the two responses"
UNCLEAR = "an answer is unclear"


@dataclass(frozen=True)
class Constitution:
    """What makes a response the better one, as a text; `digest` says which text it was."""

    text: str
    digest: str

    @classmethod
    def read(cls, path: Path) -> Constitution:
        """Read the file.

        Raises:
            DataError: it is missing or empty.
        """
        text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
        if not text:
            raise DataError(f"{path} is missing or empty: --constitution names a text, see infra/constitutions/")
        return cls(text, hashlib.sha256(text.encode()).hexdigest()[:12])


@dataclass
class Cost:
    """What was asked anew, by a server's own count of tokens; answers that were kept cost nothing."""

    requests: int = 0
    tokens: int = 0


class CountingBook(AnswerBook):
    """An answer book that knows what this run added to it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.cost = Cost()

    def add(self, key: str, who: Mapping[str, str], reply: Reply) -> None:
        """As ever, and count it."""
        super().add(key, who, reply)
        self.cost.requests += 1
        self.cost.tokens += reply.tokens


@dataclass(frozen=True)
class Budget:
    """Where a run stops before its next pair; `per_minute` spreads requests out."""

    max_requests: int
    max_tokens: int
    per_minute: float | None = None

    def spent(self, cost: Cost) -> bool:
        """Whether two more questions could be too many."""
        return cost.requests + 2 > self.max_requests or cost.tokens >= self.max_tokens


@dataclass
class Labelled:
    """What a run did: labels stored, by choice and why there is none, and pairs that it left for the next run."""

    choices: Counter[str] = field(default_factory=Counter)
    contradictions: int = 0
    unclear: int = 0
    first: int = 0
    """Of the clear answers, how many chose the response that was shown first."""
    clear: int = 0
    left: int = 0


def combined(one: Verdict, other: Verdict) -> tuple[str, str | None]:
    """Choice and, where it is a skip, the reason, of the answers with a shown first and with b shown first."""
    if "unclear" in (one, other):
        return "skip", UNCLEAR
    first, second = {"A": "a", "B": "b"}.get(one, "tie"), {"A": "b", "B": "a"}.get(other, "tie")
    return (first, None) if first == second else ("skip", CONTRADICTION)


def judge_of(params: JudgeParams, book: AnswerBook, artifacts: Path) -> PairJudge:
    """The judge that params name; the local one is the base model among the artifacts.

    Raises:
        ModelError: the base model's folder is incomplete.
    """
    if params.kind == "local":
        return LocalJudge(artifacts / "base_model", batch_size=1)
    return EndpointJudge(params, book)


def label_by_model(
    session: Session,
    judge: PairJudge,
    constitution: Constitution,
    *,
    cost: Cost,
    budget: Budget,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Labelled:
    """Label every question that this model has not labelled by this constitution; each label is stored before the next.

    A run that was killed goes on where it was: labels are in the database, answers in the judge's book.

    Args:
        cost: what the judge's book counts, see `CountingBook`.

    Raises:
        ConfigError: the model's name is too long for a labeller.
        SourceError: the server is not there, or refuses; what was labelled is kept.
    """
    labeller = MODEL + judge.who["model"]
    if len(labeller) > MODEL_NAME:
        raise ConfigError(
            f"{labeller!r} is longer than a labeller's name may be ({MODEL_NAME}): serve it under another"
        )
    done = set(session.scalars(select(Event.token).where(Event.labeller == labeller)))
    waiting = [item for item in questions(session) if _token(labeller, item, constitution) not in done]
    session.commit()  # people may write while the model thinks
    ask, result = _paced(judge, budget.per_minute, cost, clock, sleep), Labelled()
    for number, item in enumerate(waiting):
        if budget.spent(cost):
            result.left = len(waiting) - number
            break
        label = _labelled(item, labeller, ask, constitution, result)
        add_label(session, label, _token(labeller, item, constitution))
        session.commit()
    return result


def _labelled(
    item: Question, labeller: str, ask: Callable[[str], Reply], constitution: Constitution, result: Labelled
) -> Label:
    sides = (item.response_a, item.response_b)
    orders = (question(constitution.text, item.prompt, *shown) for shown in (sides, sides[::-1]))
    verdicts = [verdict(ask(text).text) for text in orders]
    choice, reason = combined(*verdicts)
    result.choices[choice] += 1
    result.contradictions += reason == CONTRADICTION
    result.unclear += reason == UNCLEAR
    result.first += verdicts.count("A")
    result.clear += verdicts.count("A") + verdicts.count("B")
    comment = "; ".join([f"constitution {constitution.digest}", *([reason] if reason else [])])
    return Label(item.id, labeller, choice, comment=comment)


def _token(labeller: str, item: Question, constitution: Constitution) -> str:
    return str(uuid5(NAMESPACE_URL, f"{labeller} {item.id} {constitution.digest}"))


def _paced(
    judge: PairJudge, per_minute: float | None, cost: Cost, clock: Callable[[], float], sleep: Callable[[float], None]
) -> Callable[[str], Reply]:
    """Ask one question, in turn after the last request; an answer that was kept does not count as one."""
    free = clock()

    def ask(text: str) -> Reply:
        nonlocal free
        sleep(max(0.0, free - clock()))
        start, before = clock(), cost.requests
        replies: Sequence[Reply] = judge.ask([text])
        if per_minute and cost.requests > before:
            free = start + 60 / per_minute
        return replies[0]

    return ask
