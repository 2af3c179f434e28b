"""Rows for the pipeline from people's feedback on served answers."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tasks.core.paths import stage_dir
from tasks.core.rows import Demonstration, Preference, Prompt, Rating, SourceRow, read_rows
from tasks.labelling.labels import pseudonym
from tasks.runtime import dvc_repo
from tasks.runtime.mlflow_traces import Feedback
from tasks.runtime.provenance import provenance_of
from tasks.runtime.registry import Version

__all__ = ["FeedbackRows", "feedback_rows", "held_out_prompts", "trained_rows"]


@dataclass(frozen=True)
class FeedbackRows:
    """Row type → rows, sorted by id; and reason → feedback that gave none. Equal feedback gives equal rows."""

    rows: Mapping[str, list[SourceRow]]
    dropped: Mapping[str, int]


def _prompt_key(prompt: str) -> str:
    """The prompt as it is compared with held-out ones: case and spaces do not count."""
    return " ".join(prompt.split()).casefold()


def held_out_prompts() -> set[str]:
    """Keys of the prompts that the last run held out; none before the first."""
    files = [stage_dir("prepare") / "prompts" / f"{split}.jsonl" for split in ("validation", "test")]
    found = [file for file in files if file.is_file() and file.stat().st_size]
    return {_prompt_key(row.prompt) for file in found for row in read_rows(file, Prompt)}


def feedback_rows(feedback: Iterable[Feedback], held_out: Collection[str]) -> FeedbackRows:
    """Make a demonstration of a correction, a preference of two answers, and a rating of all scores of one text.

    What a person says again of an answer replaces what she said before. A row's id begins with the pseudonyms of those
    who gave it.

    Args:
        held_out: see `held_out_prompts`.
    """
    dropped: Counter[str] = Counter()
    last: dict[tuple[str, ...], Feedback] = {}
    for item in feedback:
        key = (item.answer_id, pseudonym(item.user), item.kind, str(item.value) if item.kind == "preference" else "")
        dropped["repeated"] += key in last
        last[key] = item
    texts: dict[tuple[str, ...], list[Feedback]] = defaultdict(list)
    for item in last.values():
        if reason := _objection(item, held_out):
            dropped[reason] += 1
        else:
            texts[_text(item)].append(item)
    rows: dict[str, list[SourceRow]] = {"demonstrations": [], "preferences": [], "ratings": []}
    for text, items in texts.items():
        rows[f"{items[0].kind}s"].append(_row(text, items))
        dropped["duplicate"] += len(items) - 1 if items[0].kind != "rating" else 0
    ordered = {name: sorted(found, key=lambda row: row.id) for name, found in rows.items()}
    return FeedbackRows(ordered, {reason: count for reason, count in sorted(dropped.items()) if count})


def _objection(item: Feedback, held_out: Collection[str]) -> str | None:
    """Reason to make no row of it."""
    if item.prompt is None or item.answer is None:
        return "no_content"
    if _prompt_key(item.prompt) in held_out:
        return "held_out"
    if item.kind == "rating":
        return None if isinstance(item.value, float) and -1 <= item.value <= 1 else "out_of_scale"
    if item.value is None:
        return "other_prompt"
    if not item.value or (item.kind == "preference" and item.answer in ("", item.value)):
        return "no_difference"
    return None


def _text(item: Feedback) -> tuple[str, ...]:
    """What makes two rows the same."""
    prompt, answer = str(item.prompt), str(item.answer)
    if item.kind == "rating":
        return item.kind, prompt + answer
    if item.kind == "preference":
        return item.kind, prompt, answer, str(item.value)
    space = " " if answer.startswith(" ") and not str(item.value).startswith(" ") else ""
    return item.kind, prompt, f"{space}{item.value}"


def _row(text: tuple[str, ...], items: Sequence[Feedback]) -> SourceRow:
    users = sorted({pseudonym(item.user) for item in items})
    name = f"{'+'.join(users)}/{hashlib.sha256(chr(31).join(text).encode()).hexdigest()[:16]}"
    match text:
        case ("rating", whole):
            return Rating(id=name, text=whole, ratings=tuple(sorted(float(item.value or 0) for item in items)))
        case ("preference", prompt, chosen, rejected):
            return Preference(id=name, prompt=prompt, chosen=chosen, rejected=rejected, labelled_by=tuple(users))
    return Demonstration(id=name, prompt=text[1], response=text[2])


def trained_rows(version: Version, user: str) -> int:
    """How many rows by the user of this pseudonym were collected for the version; a StageError if DVC lost the rows."""
    with TemporaryDirectory(prefix="rlhf-rows-") as folder:
        rows = Path(folder) / "rows"
        dvc_repo.restore(provenance_of(version).md5_of("artifacts/collect/rows"), rows)
        return sum(user in line for file in rows.glob("*.jsonl") for line in file.open(encoding="utf-8"))
