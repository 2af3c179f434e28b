"""Stage preferences: pairs from raters, pairs as given, and the raters' ceiling."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest

from tasks.config.data import PreferencesParams
from tasks.core.errors import DataError
from tasks.core.paths import Artifacts
from tasks.core.rows import SPLITS, Preference, Rating, read_rows, write_rows
from tasks.data.pairs import rater_agreement
from tasks.preferences import preferences

PARAMS = PreferencesParams(train_pairs=60, heldout_pairs=30, source_pairs="only", min_margin=1.0, raters_per_label=1)


def prepared(folder: Path, *, given: int = 0) -> dict[str, dict[str, Rating]]:
    """What stage prepare leaves: rated texts of one split each, and perhaps preferences; the texts by split."""
    rng = random.Random(0)
    texts: dict[str, dict[str, Rating]] = {}
    for split, count in zip(SPLITS, (160, 30, 30), strict=True):
        for name in (f"{split}{number}" for number in range(count)):
            level = rng.uniform(-3, 3)
            marks = tuple(float(round(rng.gauss(level, 1))) for _ in range(8))
            texts.setdefault(split, {})[name] = Rating(id=name, text=name, ratings=marks)
        write_rows(folder / "ratings" / "proxy" / f"{split}.jsonl", texts[split].values())
        pairs = [Preference(id=str(n), prompt="p", chosen=f"a{n}", rejected=f"b{n}") for n in range(given)]
        write_rows(folder / "preferences" / f"{split}.jsonl", pairs)
    return texts


def run(tmp_path: Path, params: PreferencesParams = PARAMS, seed: int = 0) -> dict[str, list[Preference]]:
    out = tmp_path / f"out{seed}"
    preferences(params, seed, Artifacts(prepare=tmp_path, out=out))
    return {split: read_rows(out / f"{split}.jsonl", Preference) for split in SPLITS}


def ceiling(out: Path) -> dict[str, dict[str, str]]:
    with (out / "ceiling.csv").open() as file:
        return {row["bucket"]: row for row in csv.DictReader(file)}


def written(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_pairs_stay_in_their_split_and_compare_whole_texts(tmp_path: Path) -> None:
    texts = prepared(tmp_path)
    pairs = run(tmp_path)
    assert [len(pairs[split]) for split in SPLITS] == [60, 30, 30]
    for split in SPLITS:
        for row in pairs[split]:
            chosen, rejected = texts[split][row.chosen], texts[split][row.rejected]
            assert row.prompt == ""
            assert row.margin == pytest.approx(chosen.mean - rejected.mean, abs=1e-5)
    assert len({text for row in pairs["train"] for text in (row.chosen, row.rejected)}) == 120, "texts are used again"


def test_training_pairs_are_apart_and_noisy_while_held_out_ones_are_neither(tmp_path: Path) -> None:
    prepared(tmp_path)
    pairs = run(tmp_path)
    margins = [row.margin or 0.0 for row in pairs["train"]]
    assert all(abs(margin) >= 1.0 for margin in margins)
    assert 0 < sum(margin < 0 for margin in margins) < 20
    metrics = json.loads((tmp_path / "out0" / "metrics.json").read_text())
    assert metrics["training_labels"]["against_the_mean"] == sum(margin < 0 for margin in margins)
    for split in ("validation", "test"):
        heldout = [row.margin or 0.0 for row in pairs[split]]
        assert 0 < min(heldout) < 1.0 < max(heldout)


def test_the_ceiling_is_the_mean_agreement_over_the_test_pairs(tmp_path: Path) -> None:
    texts = prepared(tmp_path)["test"]
    pairs = run(tmp_path)["test"]
    rng = np.random.default_rng(0)
    shares = {row.id: rater_agreement(texts[row.chosen], texts[row.rejected], 1, rng) for row in pairs}
    table = ceiling(tmp_path / "out0")
    assert list(table) == ["0-0.5", "0.5-1", "1-2", "2-3", "3+", "1+", "all"]
    for bucket, low, high in (("0.5-1", 0.5, 1), ("1-2", 1, 2), ("1+", 1, 99), ("all", 0, 99)):
        inside = [share for row in pairs if low <= (row.margin or 0) < high and (share := shares[row.id]) is not None]
        assert int(table[bucket]["pairs"]) == len(inside)
        assert float(table[bucket]["agreement"]) == pytest.approx(np.mean(inside), abs=1e-6)
    assert float(table["3+"]["agreement"]) > float(table["0-0.5"]["agreement"])


def test_given_preferences_go_through_as_they_are(tmp_path: Path) -> None:
    prepared(tmp_path, given=100)
    pairs = run(tmp_path)
    assert [len(pairs[split]) for split in SPLITS] == [60, 30, 30]
    assert all(row.prompt == "p" and row.chosen == f"a{row.id}" for row in pairs["train"])
    assert [int(row.id) for row in pairs["train"]] == sorted(int(row.id) for row in pairs["train"])
    assert {row["agreement"] for row in ceiling(tmp_path / "out0").values()} == {""}
    assert pairs["train"] != run(tmp_path, seed=1)["train"]


def test_given_pairs_are_added_in_front_of_the_drawn_ones_of_training(tmp_path: Path) -> None:
    prepared(tmp_path)
    adding = PARAMS.model_copy(update={"source_pairs": "prepend"})
    drawn = run(tmp_path)
    before = written(tmp_path / "out0")
    run(tmp_path, adding)
    assert before == written(tmp_path / "out0"), "there is none to add"
    prepared(tmp_path, given=7)
    pairs = run(tmp_path, adding)
    assert [row.chosen for row in pairs["train"][:7]] == [f"a{number}" for number in range(7)]
    assert pairs["train"][7:] == drawn["train"]
    assert (pairs["validation"], pairs["test"]) == (drawn["validation"], drawn["test"])
    assert json.loads((tmp_path / "out0" / "metrics.json").read_text())["pairs"]["train"] == 67


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        (0, {"heldout_pairs": 500}, r"heldout_pairs asks for 500 pairs, .* only 4\d\d in test \(30 rated"),
        (0, {"min_margin": 50.0}, r"train_pairs asks for 60 .* only 0 in train \(160 rated texts, pairs at least 50"),
        (10, {}, r"train_pairs asks for 60 .* only 10 in train \(train\.jsonl of stage prepare"),
    ],
)
def test_too_few_pairs_are_an_error_that_says_how_many_there_are(
    given: int, changes: dict[str, float], message: str, tmp_path: Path
) -> None:
    prepared(tmp_path, given=given)
    with pytest.raises(DataError, match=message):
        run(tmp_path, PARAMS.model_copy(update=changes))


def test_equal_runs_write_equal_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    prepared(tmp_path)
    run(tmp_path)
    first = written(tmp_path / "out0")
    run(tmp_path)
    assert first == written(tmp_path / "out0")
    assert set(first) == {"train.jsonl", "validation.jsonl", "test.jsonl", "ceiling.csv", "metrics.json"}
    run(tmp_path, seed=1)
    assert written(tmp_path / "out1")["train.jsonl"] != first["train.jsonl"]
