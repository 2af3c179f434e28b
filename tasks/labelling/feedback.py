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
from typing import TYPE_CHECKING
from uuid import NAMESPACE_URL, uuid5

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from tasks.core.errors import ConfigError, DataError
from tasks.evals.llm_judge import EndpointJudge, JudgeCache, LocalJudge
from tasks.evals.pairwise import Choice, PairJudge, Reply, format_question, parse_verdict
from tasks.labelling.labels import LONGEST_NAME, Label, Question, add_label, questions
from tasks.labelling.queries import MODEL
from tasks.labelling.tables import Event

if TYPE_CHECKING:
    from tasks.config.evaluation import JudgeParams

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


class CountingJudge:
    """A judge in this process, each of whose answers is a request; `judge_id` holds the digest of its weights, too."""

    def __init__(self, judge: PairJudge, cost: Cost, digest: str) -> None:
        self.judge_id = {**judge.judge_id, "digest": digest}
        self._judge, self._cost = judge, cost

    def judge(self, questions: Sequence[str]) -> list[Reply]:
        """As the judge, and count it."""
        replies = self._judge.judge(questions)
        self._cost.requests += len(replies)
        self._cost.tokens += sum(reply.tokens for reply in replies)
        return replies


class CountingBook(JudgeCache):
    """An answer book that knows what this run added to it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.cost = Cost()

    def add(self, key: str, judge_id: Mapping[str, str], reply: Reply) -> None:
        """As ever, and count it."""
        super().add(key, judge_id, reply)
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


def combined(one: Choice, other: Choice) -> tuple[str, str | None]:
    """Choice and, where it is a skip, the reason, of the answers with a shown first and with b shown first."""
    if "unclear" in (one, other):
        return "skip", UNCLEAR
    first, second = {"A": "a", "B": "b"}.get(one, "tie"), {"A": "b", "B": "a"}.get(other, "tie")
    return (first, None) if first == second else ("skip", CONTRADICTION)


def judge_of(params: JudgeParams, book: CountingBook, artifacts: Path) -> PairJudge:
    """The judge that params name, whose requests the book counts; the local one is the base model among the artifacts.

    Raises:
        ModelError: the base model's folder is incomplete.
    """
    if params.kind == "local":
        base_model = artifacts / "base_model"
        return CountingJudge(LocalJudge(base_model, batch_size=1), book.cost, _digest(base_model / "model"))
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

    Its labels say by which constitution they are, and those of the base model by which weights (see `_basis`), so that
    labels that were imported count, too. A run that was killed goes on where it was: labels are in the database,
    answers in the judge's book.

    Args:
        cost: what the judge or its book counts, see `judge_of`.

    Raises:
        ConfigError: the model's name is too long for a labeller.
        SourceError: the server is not there, or refuses; what was labelled is kept.
    """
    labeller = MODEL + judge.judge_id["model"]
    if len(labeller) > LONGEST_NAME:
        raise ConfigError(
            f"{labeller!r} is longer than a labeller's name may be ({LONGEST_NAME}): serve it under another"
        )
    basis = _basis(judge, constitution)
    done = _labelled_before(session, labeller, basis)
    waiting = [item for item in questions(session) if item.id not in done]
    session.commit()  # people may write while the model thinks
    ask, result = _paced(judge, budget.per_minute, cost, clock, sleep), Labelled()
    for number, item in enumerate(waiting):
        if budget.spent(cost):
            result.left = len(waiting) - number
            break
        choice, reason = _asked(item, ask, constitution, result)
        comment = "; ".join([basis, *([reason] if reason else [])])
        add_label(session, Label(item.id, labeller, choice, comment=comment), _token(labeller, item, basis))
        session.commit()
    return result


def _basis(judge: PairJudge, constitution: Constitution) -> str:
    """How the comments of labels begin: what the label depends on besides the model's name."""
    digest = judge.judge_id.get("digest")
    return f"constitution {constitution.digest}" + (f", weights {digest}" if digest else "")


def _labelled_before(session: Session, labeller: str, basis: str) -> set[str]:
    """The questions that have a label on this basis, also if another one came after it."""
    so = or_(Event.comment == basis, Event.comment.startswith(f"{basis};", autoescape=True))
    return set(session.scalars(select(Event.item_id).where(Event.labeller == labeller, so)))


def _digest(folder: Path) -> str:
    """Of the names and contents of all files in a model's folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()[:12]


def _asked(
    item: Question, ask: Callable[[str], Reply], constitution: Constitution, result: Labelled
) -> tuple[str, str | None]:
    """Choice and, where it is a skip, the reason; counted in the result."""
    sides = (item.response_a, item.response_b)
    orders = (format_question(constitution.text, item.prompt, *shown) for shown in (sides, sides[::-1]))
    verdicts = [parse_verdict(ask(text).text) for text in orders]
    choice, reason = combined(*verdicts)
    result.choices[choice] += 1
    result.contradictions += reason == CONTRADICTION
    result.unclear += reason == UNCLEAR
    result.first += verdicts.count("A")
    result.clear += verdicts.count("A") + verdicts.count("B")
    return choice, reason


def _token(labeller: str, item: Question, basis: str) -> str:
    """Two runs at once store a label once."""
    return str(uuid5(NAMESPACE_URL, f"{labeller} {item.id} {basis}"))


def _paced(
    judge: PairJudge, per_minute: float | None, cost: Cost, clock: Callable[[], float], sleep: Callable[[float], None]
) -> Callable[[str], Reply]:
    """Ask one question, in turn after the last request; an answer that was kept does not count as one."""
    free = clock()

    def ask(text: str) -> Reply:
        nonlocal free
        sleep(max(0.0, free - clock()))
        start, before = clock(), cost.requests
        replies: Sequence[Reply] = judge.judge([text])
        if per_minute and cost.requests > before:
            free = start + 60 / per_minute
        return replies[0]

    return ask
