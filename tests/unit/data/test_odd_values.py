"""Values that are not finite, not there or of another type, in any field of any row type: kept whole or quarantined."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from tasks.collect import collect
from tasks.config.data import CollectParams, PreferencesParams, SourceParams
from tasks.core.errors import DataError
from tasks.core.paths import Artifacts
from tasks.core.rows import ROW_TYPES, SPLITS, Demonstration, Preference, Prompt, Rating, Row, read_rows
from tasks.preferences import preferences
from tasks.prepare import prepare
from tests.support.collected import PREPARE

ODD: list[Any] = [
    None, "", " ", math.nan, math.inf, -math.inf, 1e308, -1e308, 10**400, 10**18, -0.0, 5, True, [], {}, {"a": 1},
    [None], [math.nan], [1e308, 1e308], [1e7], "NaN", "inf", "1e400", "[1, NaN]", "\x00", "\ud800", "some other text",
]  # fmt: skip
OUTPUTS: dict[str, type[Row]] = {
    "demonstrations": Demonstration, "prompts": Prompt, "preferences": Preference, "preferences/gold": Preference,
    "ratings/proxy": Rating, "ratings/gold": Rating,
}  # fmt: skip
ROWS, SEEDS = 160, 5


def row_of(number: int, row_type: str, rng: random.Random) -> dict[str, Any]:
    good = {
        "id": str(number), "group": f"g{number % 40}", "prompt": f"say something of {number} now", "answer": "a",
        "response": f"well {number}", "chosen": f"good {number}", "rejected": f"bad {number}", "margin": 1.0,
        "labelled_by": ["x"], "confidence": 0.5, "objective": "o", "ratings": [rng.randrange(5) for _ in range(3)],
        "text": " ".join(f"w{rng.randrange(99)}" for _ in range(8)),
    }  # fmt: skip
    row = {name: good[name] for name in ROW_TYPES[row_type].model_fields}
    return {name: rng.choice(ODD) if rng.random() < 0.04 else value for name, value in row.items()}


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is in an output")


@pytest.mark.parametrize("row_type", ROW_TYPES)
def test_odd_values_are_kept_whole_or_quarantined(root: Path, row_type: str) -> None:
    counts = dict.fromkeys(("kept", "quarantined"), 0)
    for seed in range(SEEDS):
        rng = random.Random(seed)
        lines = [json.dumps(row_of(number, row_type, rng)) + "\n" for number in range(ROWS)]
        (root / "a.jsonl").write_text("".join(lines))
        source = SourceParams(name="a", kind="local", row_type=row_type, id="a.jsonl")  # type: ignore[arg-type]
        collect(CollectParams(sources=(source,)), 0, Artifacts(out=root / "collect"))
        params = PREPARE.model_copy(
            update={"max_quarantine_share": 1.0, "near_duplicate_threshold": 1.0, "gold_pair_share": 0.3}
        )
        prepare(params, 0, Artifacts(collect=root / "collect", out=root / "prepare"))
        if row_type in ("preferences", "ratings"):
            few = PreferencesParams(
                train_pairs=5, heldout_pairs=2, source_pairs="only", min_margin=0, raters_per_label=1
            )
            preferences(few, 0, Artifacts(prepare=root / "prepare", out=root / "pairs"))
        metrics = json.loads((root / "prepare" / "metrics.json").read_text(), parse_constant=no_constant)
        counts = {name: count + metrics["rows"][name] for name, count in counts.items()}
        for folder, row_class in OUTPUTS.items():
            for path in (root / "prepare" / folder / f"{split}.jsonl" for split in SPLITS):
                if path.is_file() and path.stat().st_size:
                    rows = read_rows(path, row_class)
                    assert len({row.id for row in rows}) == len(rows)
                    json.loads("[" + ",".join(path.read_text().splitlines()) + "]", parse_constant=no_constant)
    assert counts["kept"] > SEEDS * ROWS / 2
    assert counts["quarantined"] > SEEDS


def test_a_rating_beyond_any_scale_is_quarantined(root: Path) -> None:
    values = [1e6, -1e6, 1.1e6, -1e30]
    (root / "a.jsonl").write_text("".join(json.dumps({"text": f"t {n}", "ratings": n}) + "\n" for n in values))
    source = SourceParams(name="a", kind="local", row_type="ratings", id="a.jsonl")
    collect(CollectParams(sources=(source,)), 0, Artifacts(out=root / "collect"))
    params = PREPARE.model_copy(update={"max_quarantine_share": 0.4, "min_words": 4})
    with pytest.raises(DataError, match=r"(?s)2 of 4 rows .* equal to 1000000 .*equal to -1000000 "):
        prepare(params, 0, Artifacts(collect=root / "collect", out=root / "prepare"))
