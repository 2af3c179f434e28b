"""Stage preferences: the pairs that the reward model and DPO learn from and are measured on.

From rated texts, training labels are those of single raters (noise included) and held-out labels those of all raters.
Preferences that a source gave go through as they are, alone or before the drawn ones (`given`). Film-review pairs
compare whole texts: their prompt is empty.
Writes `{train,validation,test}.jsonl`, `ceiling.csv` (how far raters agree with each other) and `metrics.json`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from tasks.core.errors import DataError
from tasks.core.files import write_json, write_table
from tasks.core.schema import Preference, Rating, read_rows, write_rows
from tasks.core.sections.preferences import PreferencesParams
from tasks.data.agreement import rater_agreement
from tasks.data.pairs import Pair, draw_pairs, label_by_all, label_by_raters
from tasks.data.splitting import SPLITS, Split
from tasks.evals.calibration import MARGINS, margin_bucket

__all__ = ["preferences"]

COLUMNS = ("bucket", "pairs", "agreement")


def preferences(params: PreferencesParams, seed: int, *, prepare: Path, out: Path) -> None:
    """Draw, label and write the pairs of each split.

    Args:
        params: how many pairs, how far apart, how many raters per label.
        seed: decides the pairs and the raters.
        prepare: what stage prepare wrote.
        out: receives the pairs, the ceiling and the counts.

    Raises:
        DataError: fewer pairs can be made than params ask for; it says how many.
    """
    counts: Counter[str] = Counter()
    pairs: list[Pair] = []
    if params.given == "only" and _has_rows(prepare / "preferences"):
        rows = {split: _given(prepare, split, params, seed) for split in SPLITS}
    else:
        pairs = _heldout_pairs(prepare, "test", params, seed)
        rows = {
            "train": [*_added(prepare, params), *_train(prepare, params, seed, counts)],
            "validation": [label_by_all(pair) for pair in _heldout_pairs(prepare, "validation", params, seed)],
            "test": [label_by_all(pair) for pair in pairs],
        }
    written = {split: write_rows(out / f"{split}.jsonl", rows[split]) for split in SPLITS}
    ceiling = _ceiling(pairs, params, seed)
    write_table(out / "ceiling.csv", ceiling, COLUMNS)
    agreement = {str(row["bucket"]): row["agreement"] for row in ceiling if row["agreement"] != ""}
    labels = {"against_the_mean": 0, "ties_drawn_again": 0, "ties_given_up": 0} | dict(counts)
    write_json(out / "metrics.json", {"pairs": written, "training_labels": labels, "raters_agree": agreement})


def _has_rows(folder: Path, name: str = "*.jsonl") -> bool:
    return any(path.stat().st_size for path in folder.glob(name))


def _given(prepare: Path, split: Split, params: PreferencesParams, seed: int) -> list[Preference]:
    """A random sample of the pairs that sources gave, in the order in which prepare wrote them."""
    path, wanted = prepare / "preferences" / f"{split}.jsonl", _wanted(split, params)
    rows = read_rows(path, Preference)
    _check(len(rows), split, params, f"{path.name} of stage prepare holds that many")
    chosen = sorted(_rng(seed, split, "sample").sample(range(len(rows)), wanted))
    return [rows[index] for index in chosen]


def _added(prepare: Path, params: PreferencesParams) -> list[Preference]:
    """All given pairs for training, first, because DPO reads its pairs from the front.

    Those that prepare held out stay unused: validation and test measure every run on the same drawn pairs.
    """
    path = prepare / "preferences" / "train.jsonl"
    return read_rows(path, Preference) if params.given == "add" and _has_rows(path.parent, path.name) else []


def _train(prepare: Path, params: PreferencesParams, seed: int, counts: Counter[str]) -> list[Preference]:
    """Pairs at least `min_margin` apart, each labelled by its own draw of raters."""
    texts, rng = _rated(prepare, "train"), _rng(seed, "train", "raters")
    pairs = draw_pairs(texts, min_margin=params.min_margin, rng=_rng(seed, "train", "pairs"))
    labelled = (label_by_raters(pair, params.raters_per_label, rng=rng, counts=counts) for pair in pairs)
    rows = list(islice((row for row in labelled if row is not None), params.train_pairs))
    _check(len(rows), "train", params, f"{len(texts)} rated texts, pairs at least {params.min_margin} points apart")
    return rows


def _heldout_pairs(prepare: Path, split: Split, params: PreferencesParams, seed: int) -> list[Pair]:
    """Pairs of any margin, because accuracy is reported over the whole range."""
    texts = _rated(prepare, split)
    pairs = list(islice(draw_pairs(texts, min_margin=0.0, rng=_rng(seed, split, "pairs")), params.heldout_pairs))
    _check(len(pairs), split, params, f"{len(texts)} rated texts")
    return pairs


def _rated(prepare: Path, split: Split) -> list[Rating]:
    return read_rows(prepare / "ratings" / "proxy" / f"{split}.jsonl", Rating)


def _rng(seed: int, split: Split, purpose: str) -> random.Random:
    return random.Random(f"{seed}/{split}/{purpose}")


def _wanted(split: Split, params: PreferencesParams) -> int:
    return params.train_pairs if split == "train" else params.heldout_pairs


def _check(found: int, split: Split, params: PreferencesParams, where: str) -> None:
    name = "train_pairs" if split == "train" else "heldout_pairs"
    wanted = _wanted(split, params)
    if found < wanted:
        raise DataError(
            f"preferences.{name} asks for {wanted} pairs, but there are only {found} in {split} ({where}): lower "
            f"preferences.{name}, or collect more"
        )


def _ceiling(pairs: Sequence[Pair], params: PreferencesParams, seed: int) -> list[dict[str, object]]:
    """Per margin bucket, and for all pairs and those a point or more apart: mean agreement over the test pairs.

    Where a source gave the preferences themselves, no rater is known and the table is empty.
    """
    rng = np.random.default_rng(seed)
    known = [(label_by_all(pair).margin or 0.0, rater_agreement(*pair, params.raters_per_label, rng)) for pair in pairs]
    groups = {name: [share for gap, share in known if margin_bucket(gap) == name] for name in MARGINS.names()}
    groups |= {f"{MARGINS.clear:g}+": [share for gap, share in known if gap >= MARGINS.clear]}
    groups |= {"all": [share for _, share in known]}
    return [_row(name, [share for share in shares if share is not None]) for name, shares in groups.items()]


def _row(bucket: str, shares: Sequence[float]) -> dict[str, object]:
    return {"bucket": bucket, "pairs": len(shares), "agreement": round(float(np.mean(shares)), 6) if shares else ""}


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("preferences")
