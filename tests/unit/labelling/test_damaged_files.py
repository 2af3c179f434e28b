"""Files for labelling that are damaged in any way: they are read, or one error says why not."""

import random
import re
from collections import Counter
from pathlib import Path

import pytest

from tasks.core.errors import DataError
from tasks.labelling.formats import FORMATS, dump, load
from tasks.labelling.labels import Label
from tasks.labelling.pairs import gold_questions
from tasks.labelling.store import LabelStore
from tests.support.labels import pair

INPUTS = 700
JUNK = (
    b"9" * 4301, b"1e999", b"-1", b"NaN", b"Infinity", b"[" * 5000, b'{"a":' * 5000, b'"\\ud800"', b'"\\u0000"',
    b"\xff", b"\0", b"null", b"{}", b"[]", b'""', b"true", b'["a"]', b"4.5",
)  # fmt: skip
GOLD = b"""{"prompt": "p", "response_a": "x", "response_b": "y", "gold": "a"}
{"id": "1", "prompt": "p", "chosen": "x", "rejected": "y", "margin": 4.0, "labelled_by": ["ann"]}
"""


def damage(content: bytes, rng: random.Random) -> bytes:
    """Flip a byte, cut or repeat some, put junk in, or put junk in the place of a value."""
    start = rng.randrange(len(content))
    end = start + rng.randint(1, 30)
    values = [found.span(1) for found in re.finditer(rb": (\"[^\"]*\"|[^,\]}{]+)", content)]
    place = rng.choice(values)
    return rng.choice([
        content[:start] + rng.randbytes(1) + content[start + 1 :],
        content[:start] + content[end:],
        content[:end] + content[start:],
        content[:start] + rng.choice(JUNK) + content[end:],
        *[content[: place[0]] + rng.choice(JUNK) + content[place[1] :]] * 4,
    ])  # fmt: skip


def read(kind: str, path: Path, store: LabelStore) -> None:
    if kind == "gold":
        store.add_questions(gold_questions(path, min_margin=3, count=5))
    else:
        store.import_records(load(path, kind))  # type: ignore[arg-type]


def written(kind: str) -> bytes:
    labels = [
        Label(pair(1).id, "ann@here.org", "a", 2, 3, 1, "why ü", swapped=True, seconds=2.5, guidelines="0" * 64),
        Label(pair(1).id, "bob", "skip"),
        Label(pair(1).id, "model:m", "tie"),
    ]
    if kind == "gold":
        return GOLD
    text = dump([pair(1), pair(2)], labels, kind)  # type: ignore[arg-type]
    return re.sub(r'"question_id": "\w+", ', "", text).encode()  # which would refuse all changes of a text


@pytest.mark.parametrize("kind", [*FORMATS, "gold"])
def test_a_damaged_file_is_read_or_refused_with_one_error(kind: str, store: LabelStore, tmp_path: Path) -> None:
    rng, path = random.Random(kind), tmp_path / "file"
    results: Counter[str] = Counter()
    for _ in range(INPUTS):
        path.write_bytes(damage(written(kind), rng))
        try:
            read(kind, path, store)
            results["read"] += 1
        except DataError:
            results["refused"] += 1
    assert min(results["read"], results["refused"]) > INPUTS / 50
