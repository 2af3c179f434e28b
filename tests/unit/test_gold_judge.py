"""The gold judge on pairs: it reads the gold half alone, and is measured on what it has not seen."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tasks.core.errors import DataError
from tasks.core.schema import Preference, read_rows, write_rows
from tasks.rewards.learned import GoldJudge
from tests.unit.rewards.test_kinds import PAIRS, pair
from tests.unit.tiny_stages import run_gold_judge, write_inputs


def test_a_judge_of_pairs_orders_what_it_was_measured_on(tmp_path: Path) -> None:
    """The last letter decides what people prefer."""
    write_inputs(tmp_path)
    gold, draw = tmp_path / "prepare" / "preferences" / "gold", random.Random(1)
    for split in ("train", "test"):
        write_rows(gold / f"{split}.jsonl", [pair(draw, number) for number in range(PAIRS)])
    out = tmp_path / "out"
    out.mkdir()
    run_gold_judge(tmp_path, out, kind="preference", epochs=3, batch_size=8, learning_rate=0.03, max_examples=30)
    found = json.loads((out / "metrics.json").read_text())
    assert (found["pairs"], found["heldout_pairs"]) == (30, PAIRS)
    assert found["heldout_accuracy"] > 0.9
    judge = GoldJudge.load(tmp_path / "base_model", out)
    pairs = read_rows(gold / "test.jsonl", Preference)
    prompts = [row.prompt for row in pairs]
    gaps = judge(prompts, [row.chosen for row in pairs]) - judge(prompts, [row.rejected for row in pairs])
    assert (gaps > 0).float().mean().item() == pytest.approx(found["heldout_accuracy"])
    (gold / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"preferences/gold/train\.jsonl does not exist"):
        run_gold_judge(tmp_path, out, kind="preference")
