"""Rows that do not fit max_length: what a stage says that it learned from is what its trainer was given."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tasks.config.training import DPOParams, SFTParams
from tasks.core.errors import DataError
from tasks.core.paths import Artifacts
from tasks.core.rows import Demonstration, Preference, read_rows, write_rows
from tasks.dpo import dpo
from tasks.sft import sft
from tests.support import tiny_stages
from tests.support.tiny_stages import LORA, ROWS, run_gold_judge, run_reward_model, write_inputs

LONG = 5  # rows whose prompt has 40 letters, of which a maximum of 24 tokens keeps the last


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Twenty demonstrations and pairs of at most 23 tokens; the first five have a prompt of 40 letters more."""
    of = tmp_path / "in"
    write_inputs(of)
    lengthen(of / "prepare" / "demonstrations" / "train.jsonl", Demonstration)
    lengthen(of / "preferences" / "train.jsonl", Preference)
    lengthen(of / "prepare" / "preferences" / "gold" / "train.jsonl", Preference)
    return of


def lengthen(file: Path, kind: Any) -> None:
    rows = read_rows(file, kind)
    write_rows(file, [row.model_copy(update={"prompt": "b" * 40 + row.prompt}) for row in rows[:LONG]] + rows[LONG:])


def figures(out: Path) -> dict[str, float]:
    content: dict[str, float] = json.loads((out / "metrics.json").read_text())
    return content


def run_sft(of: Path, out: Path, **changes: Any) -> None:
    params = SFTParams.model_validate(tiny_stages._SFT.model_dump() | changes)
    sft(params, LORA, None, 0, Artifacts(base_model=of / "base_model", prepare=of / "prepare", out=out))


def run_dpo(of: Path, out: Path, **changes: Any) -> None:
    params = DPOParams.model_validate(tiny_stages._DPO.model_dump() | {"max_pairs": ROWS} | changes)
    folders = {name: of / name for name in ("base_model", "sft", "preferences")}
    dpo(params, LORA, 0, Artifacts(**folders, out=out))


def run_pair_judge(of: Path, out: Path, **changes: Any) -> None:
    run_gold_judge(of, out, kind="preference", **changes)


STAGES: Mapping[str, Callable[..., None]] = {
    "sft": run_sft, "dpo": run_dpo, "reward_model": run_reward_model, "gold_judge": run_pair_judge
}  # fmt: skip
COUNTS = {"sft": "examples", "dpo": "pairs", "reward_model": "pairs", "gold_judge": "pairs"}


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_counted_is_what_is_trained(
    stage: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers: list[Any] = []
    train = getattr(__import__(f"tasks.{stage}", fromlist=["x"]), "train_or_resume")  # noqa: B009
    monkeypatch.setattr(f"tasks.{stage}.train_or_resume", lambda trainer: (trainers.append(trainer), train(trainer)))
    STAGES[stage](inputs, tmp_path, epochs=1, max_length=24, max_cut_share=0.5)
    found, (trainer,) = figures(tmp_path), trainers
    assert found[COUNTS[stage]] == found["rows/kept"] == len(trainer.train_dataset) == ROWS
    assert (found["rows/prompt_cut"], found["rows/response_too_long"], found["max_length"]) == (LONG, 0, 24)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(ROWS)])
    assert batch["input_ids"].shape[1] <= 24
    for row in (trainer.train_dataset[number] for number in range(LONG)) if stage != "sft" else ():
        assert len({tuple(row[name]) for name in row if name in ("chosen_ids", "rejected_ids")}) == 2


@pytest.mark.parametrize("stage", STAGES)
def test_a_share_of_rows_that_do_not_fit_is_an_error_with_the_length_to_set(
    stage: str, inputs: Path, tmp_path: Path
) -> None:
    message = (
        rf"{stage}: 5 of 20 rows do not fit max_length 24 .prompt_cut 5.*set {stage}\.max_length to \d\d, or to auto"
    )
    with pytest.raises(DataError, match=message):
        STAGES[stage](inputs, tmp_path, max_length=24)
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_fits_is_an_error_whatever_is_allowed(stage: str, inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{stage}: 20 of 20 rows do not fit max_length 2 .response_too_long 20"):
        STAGES[stage](inputs, tmp_path, max_length=2, max_cut_share=0.99)


@pytest.mark.parametrize("stage", STAGES)
def test_auto_cuts_nothing(stage: str, inputs: Path, tmp_path: Path) -> None:
    STAGES[stage](inputs, tmp_path, epochs=1, max_length="auto")
    found = figures(tmp_path)
    assert found["rows/kept"] == ROWS
    assert not found["rows/prompt_cut"] + found["rows/response_too_long"]
    assert 41 < found["max_length"] <= 64
