"""Stage preferences: draw and label the pairs for training and evaluating the reward model and DPO.

From rated texts, training labels are those of single raters (noise included) and held-out labels those of all raters.
Preferences of a source are used as they are, alone or before the drawn ones (`source_pairs`). Film-review pairs
compare whole texts: their prompt is empty.
Writes `{train,validation,test}.jsonl`, `ceiling.csv` (how far raters agree with each other) and `metrics.json`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tasks.core.errors import DataError
from tasks.core.paths import Artifacts
from tasks.core.rows import SPLITS, Preference, Rating, Split, read_rows, write_json, write_rows, write_table
from tasks.data.pairs import Pair, draw_pairs, label_by_all, label_by_raters, rater_agreement
from tasks.rewards.metrics import CLEAR_MARGIN, MARGIN_BUCKETS, margin_bucket

if TYPE_CHECKING:
    from tasks.config.data import PreferencesParams

__all__ = ["preferences"]

COLUMNS = ("bucket", "pairs", "agreement")


def preferences(params: PreferencesParams, seed: int, artifacts: Artifacts) -> None:
    """Draw, label and write the pairs of each split; the seed decides the pairs and the raters.

    Raises:
        DataError: fewer pairs can be made than params ask for; it says how many.
    """
    counts: Counter[str] = Counter()
    pairs: list[Pair] = []
    if params.source_pairs == "only" and _has_rows(artifacts.prepare / "preferences"):
        rows = {split: _sample_source_pairs(artifacts.prepare, split, params, seed) for split in SPLITS}
    else:
        pairs = _heldout_pairs(artifacts.prepare, "test", params, seed)
        rows = {
            "train": [*_all_source_pairs(artifacts.prepare, params), *_train(artifacts.prepare, params, seed, counts)],
            "validation": [
                label_by_all(pair) for pair in _heldout_pairs(artifacts.prepare, "validation", params, seed)
            ],
            "test": [label_by_all(pair) for pair in pairs],
        }
    written = {split: write_rows(artifacts.out / f"{split}.jsonl", rows[split]) for split in SPLITS}
    ceiling = _rater_ceiling(pairs, params, seed)
    write_table(artifacts.out / "ceiling.csv", ceiling, COLUMNS)
    agreement = {str(row["bucket"]): row["agreement"] for row in ceiling if row["agreement"] != ""}
    labels = {"against_the_mean": 0, "ties_drawn_again": 0, "ties_given_up": 0} | dict(counts)
    write_json(artifacts.out / "metrics.json", {"pairs": written, "training_labels": labels, "raters_agree": agreement})


def _has_rows(folder: Path, name: str = "*.jsonl") -> bool:
    return any(path.stat().st_size for path in folder.glob(name))


def _sample_source_pairs(prepare: Path, split: Split, params: PreferencesParams, seed: int) -> list[Preference]:
    """Sample pairs of the sources, in the order in which prepare wrote them."""
    path = prepare / "preferences" / f"{split}.jsonl"
    rows = read_rows(path, Preference)
    count = _checked_count(len(rows), split, params, f"{path.name} of stage prepare holds that many")
    chosen = sorted(_rng(seed, split, "sample").sample(range(len(rows)), count))
    return [rows[index] for index in chosen]


def _all_source_pairs(prepare: Path, params: PreferencesParams) -> list[Preference]:
    """All training pairs of the sources; they come first, because DPO reads its pairs from the front.

    Those that prepare held out stay unused: validation and test measure every run on the same drawn pairs.
    """
    path = prepare / "preferences" / "train.jsonl"
    return read_rows(path, Preference) if params.source_pairs == "prepend" and _has_rows(path.parent, path.name) else []


def _train(prepare: Path, params: PreferencesParams, seed: int, counts: Counter[str]) -> list[Preference]:
    """Draw training pairs at least `min_margin` apart, each labelled by its own sample of raters."""
    texts, rng = _read_ratings(prepare, "train"), _rng(seed, "train", "raters")
    pairs = draw_pairs(texts, min_margin=params.min_margin, rng=_rng(seed, "train", "pairs"))
    labelled = (label_by_raters(pair, params.raters_per_label, rng=rng, counts=counts) for pair in pairs)
    rows = list(islice((row for row in labelled if row is not None), params.train_pairs))
    reason = f"{len(texts)} rated texts, pairs at least {params.min_margin} points apart"
    _checked_count(len(rows), "train", params, reason)
    return rows


def _heldout_pairs(prepare: Path, split: Split, params: PreferencesParams, seed: int) -> list[Pair]:
    """Draw pairs of any margin, because accuracy is reported over the whole range."""
    texts = _read_ratings(prepare, split)
    pairs = list(islice(draw_pairs(texts, min_margin=0.0, rng=_rng(seed, split, "pairs")), params.heldout_pairs))
    _checked_count(len(pairs), split, params, f"{len(texts)} rated texts")
    return pairs


def _read_ratings(prepare: Path, split: Split) -> list[Rating]:
    return read_rows(prepare / "ratings" / "proxy" / f"{split}.jsonl", Rating)


def _rng(seed: int, split: Split, purpose: str) -> random.Random:
    return random.Random(f"{seed}/{split}/{purpose}")


def _checked_count(available: int, split: Split, params: PreferencesParams, where: str) -> int:
    """The number of pairs that params ask for, of which there must be enough."""
    name, target = ("train_pairs", params.train_pairs) if split == "train" else ("heldout_pairs", params.heldout_pairs)
    if available < target:
        raise DataError(
            f"preferences.{name} asks for {target} pairs, but there are only {available} in {split} ({where}): lower "
            f"preferences.{name}, or collect more"
        )
    return target


def _rater_ceiling(pairs: Sequence[Pair], params: PreferencesParams, seed: int) -> list[dict[str, object]]:
    """Per margin bucket, and for all pairs and those a point or more apart: mean agreement over the test pairs.

    Where a source gave the preferences themselves, no rater is known and the table is empty.
    """
    rng = np.random.default_rng(seed)
    known = [(label_by_all(pair).margin or 0.0, rater_agreement(*pair, params.raters_per_label, rng)) for pair in pairs]
    groups = {name: [share for gap, share in known if margin_bucket(gap) == name] for name in MARGIN_BUCKETS}
    groups |= {f"{CLEAR_MARGIN:g}+": [share for gap, share in known if gap >= CLEAR_MARGIN]}
    groups |= {"all": [share for _, share in known]}
    return [_row(name, [share for share in shares if share is not None]) for name, shares in groups.items()]


def _row(bucket: str, shares: Sequence[float]) -> dict[str, object]:
    return {"bucket": bucket, "pairs": len(shares), "agreement": round(float(np.mean(shares)), 6) if shares else ""}


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("preferences")
