"""Labels by a language model that reads a written constitution (RLAIF).

Source: Bai et al. 2022, "Constitutional AI: Harmlessness from AI Feedback", arXiv 2212.08073, section 4.1. There the
model is shown one principle drawn at random; here the whole constitution, so that no label depends on a draw.

Each pair is asked in both orders (see `tasks.evals.pairwise`); answers that contradict each other or are unclear are a
skip, which says why.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

from pydantic import ValidationError

from tasks.config.evaluation import JudgeParams
from tasks.config.params import parse_override
from tasks.core.errors import ConfigError, DataError
from tasks.core.rows import format_validation_error
from tasks.evals.llm_judge import load_judge
from tasks.evals.pairwise import Choice, Cost, PairJudge, Reply, format_question, parse_verdict
from tasks.labelling.formats import read_text
from tasks.labelling.labels import MAX_NAME_LENGTH, MODEL_PREFIX, Label, Question
from tasks.labelling.store import LabelStore

__all__ = [
    "AutoLabelResult", "Budget", "Constitution", "auto_label", "combine_orders", "load_labeller", "parse_judge",
]  # fmt: skip

CONTRADICTION = "the answer changes with the order of the two responses"
UNCLEAR = "an answer is unclear"


def parse_judge(text: str) -> JudgeParams:
    """Parse the judge as params.yaml has it; how many prompts it is asked depends on the database alone.

    Raises:
        ConfigError: no such judge, or one with a rubric, whose place the constitution takes.
    """
    content = parse_override(f"judge={text}")["judge"]
    if not isinstance(content, dict):
        raise ConfigError(f"--judge: '{{kind: endpoint, base_url: …, model: …}}' expected, got {text!r}")
    if "rubric" in content:
        raise ConfigError("--judge: rubric has no meaning here, --constitution says what is better: leave it out")
    try:
        return JudgeParams.model_validate({"prompts": 1} | content)
    except ValidationError as error:
        raise ConfigError(f"--judge: {format_validation_error(error)}") from None


@dataclass(frozen=True)
class Constitution:
    """A text that says what makes a response better, and its digest."""

    text: str
    digest: str

    @classmethod
    def read(cls, path: Path) -> Constitution:
        """Read the file.

        Raises:
            DataError: it is missing or empty.
        """
        text = read_text(path).strip()
        if not text:
            raise DataError(f"{path} is empty: --constitution names a text, see infra/constitutions/")
        return cls(text, hashlib.sha256(text.encode()).hexdigest()[:12])


@dataclass(frozen=True)
class Budget:
    """Limits at which a run stops before its next pair; `per_minute` spreads requests out."""

    max_requests: int
    max_tokens: int
    per_minute: float | None = None

    def spent(self, cost: Cost) -> bool:
        """Return whether two more questions could be too many."""
        return cost.requests + 2 > self.max_requests or cost.tokens >= self.max_tokens


@dataclass
class AutoLabelResult:
    """Labels by choice, reasons of skips, clear answers and those that chose the response shown first, pairs left."""

    choices: Counter[str] = field(default_factory=Counter)
    contradictions: int = 0
    unclear: int = 0
    clear: int = 0
    first: int = 0
    left: int = 0


def combine_orders(one: Choice, other: Choice) -> tuple[str, str | None]:
    """Return the choice and, for a skip, its reason, from the answers with a shown first and with b shown first."""
    if "unclear" in (one, other):
        return "skip", UNCLEAR
    first, second = {"A": "a", "B": "b"}.get(one, one), {"A": "b", "B": "a"}.get(other, other)
    return (first, None) if first == second else ("skip", CONTRADICTION)


def load_labeller(params: JudgeParams, artifacts: Path) -> tuple[PairJudge, str | None]:
    """Load the judge, and of the base model among the artifacts the digest of its weights."""
    base_model = artifacts / "base_model"
    judge = load_judge(params, base_model, batch_size=1)
    return judge, _digest(base_model / "model") if params.kind == "local" else None


def auto_label(
    store: LabelStore, judge: PairJudge, constitution: Constitution, *, budget: Budget, weights: str | None = None
) -> AutoLabelResult:
    """Label every question that this model has not labelled by this constitution; each label is stored before the next.

    The comments of its labels begin with the constitution, and those of the base model with its weights, so that labels
    that were imported, or that another one came after, count, too. A run that was killed goes on where it was: labels
    are in the database, answers in the judge's cache.

    Args:
        weights: see `load_labeller`.

    Raises:
        ConfigError: the model's name is too long for a labeller.
    """
    labeller = MODEL_PREFIX + judge.judge_id["model"]
    if len(labeller) > MAX_NAME_LENGTH:
        most = f"longer than a labeller's name may be ({MAX_NAME_LENGTH})"
        raise ConfigError(f"{labeller!r} is {most}: serve it under another")
    source = f"constitution {constitution.digest}" + (f", weights {weights}" if weights else "")
    own = [label for label in store.recorded_labels(labeller) if (label.comment or "").split(";")[0] == source]
    labelled = {label.question_id for label in own}
    waiting = [item for item in store.questions() if item.id not in labelled]
    ask, result = _rate_limited(judge, budget.per_minute), AutoLabelResult()
    for number, item in enumerate(waiting):
        if budget.spent(judge.cost):
            result.left = len(waiting) - number
            break
        choice, reason = _judge_both_orders(item, ask, constitution, result)
        label = Label(item.id, labeller, choice, comment="; ".join(filter(None, [source, reason])))
        token = str(uuid5(NAMESPACE_URL, f"{labeller} {item.id} {source}"))  # two runs at once store a label once
        store.save_label(label, token=token)
    return result


def _digest(folder: Path) -> str:
    """Hash the names and contents of all files in a model's folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()[:12]


def _judge_both_orders(
    item: Question, ask: Callable[[str], Reply], constitution: Constitution, result: AutoLabelResult
) -> tuple[str, str | None]:
    """Return the choice and, for a skip, its reason; count both in the result."""
    sides = (item.response_a, item.response_b)
    orders = (format_question(constitution.text, item.prompt, *shown) for shown in (sides, sides[::-1]))
    verdicts = [parse_verdict(ask(text).text) for text in orders]
    choice, reason = combine_orders(*verdicts)
    result.choices[choice] += 1
    result.contradictions += reason == CONTRADICTION
    result.unclear += reason == UNCLEAR
    result.first += verdicts.count("A")
    result.clear += verdicts.count("A") + verdicts.count("B")
    return choice, reason


def _rate_limited(judge: PairJudge, per_minute: float | None) -> Callable[[str], Reply]:
    """Return a function that asks one question when the last request is old enough; cached answers do not wait."""
    free = time.monotonic()

    def ask(text: str) -> Reply:
        nonlocal free
        time.sleep(max(0.0, free - time.monotonic()))
        start, before = time.monotonic(), judge.cost.requests
        (reply,) = judge.judge([text])
        if per_minute and judge.cost.requests > before:
            free = start + 60 / per_minute
        return reply

    return ask
