"""Stage collect: rows with their origin, and a card per source."""

import hashlib
import json
from pathlib import Path

import pytest

from tasks.collect import collect
from tasks.config.data import CollectParams, SourceParams
from tasks.core.paths import Artifacts


@pytest.fixture
def root(root: Path) -> Path:
    (root / "a.jsonl").write_text('{"prompt": "one"}\n{broken\n')
    (root / "b.csv").write_text('id,text,ratings\nx,good,"[1, 2]"\n')
    return root


def run(out: Path) -> None:
    first = SourceParams(name="a", kind="local", row_type="prompts", id="a.jsonl", licence="CC0-1.0")
    second = SourceParams(name="b", kind="local", row_type="ratings", id="b.csv")
    collect(CollectParams(sources=(first, second)), 0, Artifacts(out=out))


def test_rows_cards_and_counts(root: Path) -> None:
    run(root / "out")
    rows = [json.loads(line) for line in (root / "out" / "rows" / "a.jsonl").read_text().splitlines()]
    assert rows[0] == {"file": "a.jsonl", "line": 1, "row": {"id": "a-1", "prompt": "one"}}
    assert (rows[1]["line"], rows[1]["raw"]) == (2, "{broken")
    card = json.loads((root / "out" / "cards" / "a.json").read_text())
    assert card["sha256"] == hashlib.sha256((root / "a.jsonl").read_bytes()).hexdigest()
    expected = {"type": "prompts", "source": "local file a.jsonl", "licence": "CC0-1.0", "rows": 2, "unreadable": 1}
    assert expected.items() <= card.items()
    assert json.loads((root / "out" / "metrics.json").read_text()) == {"rows": 3, "rows_of": {"a": 2, "b": 1}}


def test_two_runs_write_equal_bytes_without_any_path_of_this_machine(root: Path) -> None:
    for out in ("one", "two"):
        run(root / out)
    files = sorted(path.relative_to(root / "one") for path in (root / "one").rglob("*.json*"))
    assert len(files) == 5
    for file in files:
        content = (root / "one" / file).read_bytes()
        assert content == (root / "two" / file).read_bytes()
        assert str(root).encode() not in content
