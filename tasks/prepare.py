"""Stage prepare: collected rows, validated, normalised, without duplicates, split so that nothing leaks.

Writes for each split `demonstrations/`, `prompts/`, `preferences/` (as a source gave them; `preferences/gold/` for the
gold judge alone) and `ratings/{proxy,gold}/`, all of which exist even where empty, `quarantine.jsonl` with every
malformed row, and `metrics.json` with every count.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tasks.core.errors import DataError
from tasks.core.files import write_json
from tasks.core.schema import Demonstration, Preference, Prompt, Rating, Row, write_rows
from tasks.core.sections.prepare import PrepareParams
from tasks.data.cleaning import Cleaned, check_quarantine, clean, in_length, key, whole_texts
from tasks.data.duplicates import near_duplicates
from tasks.data.splitting import HALVES, SPLITS, Half, Split, half_of, in_stable_order, split_of, uniform

__all__ = ["prepare"]

logger = logging.getLogger(__name__)

REASONS = ("too_short", "too_long", "identical_after_truncation", "duplicate", "near_duplicate", "same_prompt")

Splits = Mapping[Split, Sequence[Row]]


def prepare(params: PrepareParams, seed: int, *, collect: Path, out: Path) -> None:
    """Clean and split everything that was collected.

    Args:
        params: bounds, thresholds and shares.
        seed: decides the split of each text, together with the text itself.
        collect: what stage collect wrote.
        out: receives the rows of each split, the quarantine and the counts.

    Raises:
        DataError: too many rows are malformed, or nothing is left to train on.
    """
    cleaned = clean(collect)
    write_rows(out / "quarantine.jsonl", cleaned.quarantine)
    check_quarantine(cleaned, out / "quarantine.jsonl", params.max_quarantine_share)
    rows = _without_duplicates(in_length(cleaned, params), cleaned, params.near_duplicate_threshold)
    if not rows:
        raise DataError(
            f"none of {cleaned.collected} collected rows is left{_reasons(cleaned)}; look at prepare's bounds"
        )
    splits = _split(rows, params, seed)
    splits, gold_pairs = _gold_pairs_apart(splits, params, seed)
    ratings = {half: _rated(splits, half, params, seed) for half in HALVES}
    gold = {split: [_cut(row, params.prompt_words) for row in rated] for split, rated in ratings["gold"].items()}
    demonstrations = _demonstrations(splits, ratings["proxy"], params)
    prompts = _prompts(splits, {"test": [*gold["test"], *gold_pairs["test"]]}, demonstrations, cleaned.dropped, seed)
    if not prompts["train"]:
        raise DataError(f"no prompt to train on is left of {cleaned.collected} collected rows{_reasons(cleaned)}")
    written = {f"ratings_{half}": _write(out / "ratings" / half, ratings[half]) for half in HALVES}
    del demonstrations["test"]
    written["demonstrations"] = _write(out / "demonstrations", demonstrations)
    written["prompts"] = _write(out / "prompts", prompts)
    written["preferences"] = _write(out / "preferences", _of_type(splits, Preference))
    gold_written = _write(out / "preferences" / "gold", gold_pairs)
    if params.gold_pair_share:
        written["preferences_gold"] = gold_written
    _write_metrics(out, cleaned, len(rows), written)


def _without_duplicates(rows: list[Row], cleaned: Cleaned, threshold: float) -> list[Row]:
    """Drop rows that say the same again, and rows whose key nearly repeats an earlier, different one; count both.

    Rows of one type with one key but different content (two answers to a prompt) stay, and stay together. So do labels
    of different people that say the same.
    """
    unique: dict[tuple[object, ...], Row] = {}
    for row in rows:
        said = [*whole_texts(row), getattr(row, "objective", None) or ""]
        identity = (type(row), "\x1f".join(said), getattr(row, "labelled_by", None))
        cleaned.dropped["duplicate"] += identity in unique
        unique.setdefault(identity, row)
    keys = list(dict.fromkeys(key(row) for row in unique.values()))
    repeated = {keys[index] for index in near_duplicates(keys, threshold)}
    kept = [row for row in unique.values() if key(row) not in repeated]
    cleaned.dropped["near_duplicate"] += len(unique) - len(kept)
    return kept


def _split(rows: list[Row], params: PrepareParams, seed: int) -> dict[Split, list[Row]]:
    """Rows by split, each in an order that is random but stable."""
    splits: dict[Split, list[Row]] = {split: [] for split in SPLITS}
    for row in in_stable_order(((f"{key(row)}\x1f{row.id}", row) for row in rows), seed):
        splits[split_of(key(row), params, seed)].append(row)
    return splits


def _gold_pairs_apart(splits: Splits, params: PrepareParams, seed: int) -> tuple[dict[Split, list[Row]], Splits]:
    """All rows but the gold judge's pairs, and these; the pairs of one prompt stay together."""

    def gold(row: Row) -> bool:
        return isinstance(row, Preference) and uniform(key(row), seed, "half") < params.gold_pair_share

    rest = {split: [row for row in rows if not gold(row)] for split, rows in splits.items()}
    return rest, {split: [row for row in rows if gold(row)] for split, rows in splits.items()}


def _of_type(splits: Splits, *types: type[Row]) -> dict[Split, list[Row]]:
    return {split: [row for row in rows if isinstance(row, types)] for split, rows in splits.items()}


def _rated(splits: Splits, half: Half, params: PrepareParams, seed: int) -> dict[Split, list[Rating]]:
    """The rated texts of one half, by split."""
    return {
        split: [row for row in rows if isinstance(row, Rating) and half_of(row.text, params, seed) == half]
        for split, rows in splits.items()
    }


def _demonstrations(splits: Splits, proxy: dict[Split, list[Rating]], params: PrepareParams) -> dict[Split, list[Row]]:
    """Demonstrations that a source gave, and rated texts of the proxy half cut in two.

    Where there is neither, the chosen sides of preferences that have a prompt.
    """
    given = _of_type(splits, Demonstration)
    result = {split: [*given[split], *(_cut(row, params.prompt_words) for row in proxy[split])] for split in SPLITS}
    if not any(result.values()):
        for split, rows in splits.items():
            result[split] = [_chosen(row) for row in rows if isinstance(row, Preference) and row.prompt]
    return result


def _chosen(row: Preference) -> Demonstration:
    return Demonstration(id=row.id, prompt=row.prompt, response=row.chosen)


def _cut(row: Rating, words: int) -> Demonstration:
    """A rated text as prompt (its first words) and response (the rest, with its leading space)."""
    prompt = " ".join(row.text.split()[:words])
    return Demonstration(id=row.id, prompt=prompt, response=row.text[len(prompt) :])


def _prompts(
    splits: Splits, gold: Splits, demonstrations: Splits, dropped: Counter[str], seed: int
) -> dict[Split, list[Row]]:
    """Where policies begin, each prompt once; none of validation or test equals one of an earlier split.

    Training prompts of rated texts come from the proxy half alone. Test prompts come from the test split of both
    halves, for the policy has seen neither.
    """
    given, result, seen = _of_type(splits, Prompt, Preference), {}, dict[str, Split]()
    for split in SPLITS:
        rows = [*given[split], *demonstrations[split], *(gold["test"] if split == "test" else ())]
        prompts = [Prompt.model_validate(_prompt_fields(row)) for row in rows if getattr(row, "prompt", "")]
        prompts.sort(key=lambda row: row.answer is None)  # a preference knows no right answer, its prompt may have one
        result[split] = _unique(in_stable_order(((row.prompt, row) for row in prompts), seed), split, seen, dropped)
    return result


def _prompt_fields(row: Row) -> dict[str, object]:
    return {name: value for name, value in row.model_dump().items() if name in Prompt.model_fields}


def _unique(rows: list[Prompt], split: Split, seen: dict[str, Split], dropped: Counter[str]) -> list[Row]:
    """The first row of each prompt; a repeated one is counted by the split in which it came first."""
    kept, taken = list[Row](), set[str]()
    for row in rows:
        first = seen.setdefault(row.prompt, split)
        if first != split:
            dropped[f"{split}_prompt_also_in_{first}"] += 1
        elif row.prompt in taken:
            dropped["same_prompt"] += 1
        else:
            kept.append(row)
            taken.add(row.prompt)
    return kept


def _write(folder: Path, rows: Splits) -> dict[str, int]:
    return {split: write_rows(folder / f"{split}.jsonl", items) for split, items in rows.items()}


def _write_metrics(out: Path, cleaned: Cleaned, kept: int, written: dict[str, dict[str, int]]) -> None:
    rows = {"collected": cleaned.collected, "quarantined": len(cleaned.quarantine), "kept": kept}
    dropped = dict.fromkeys(REASONS, 0) | dict(sorted(cleaned.dropped.items()))
    write_json(out / "metrics.json", {"rows": rows, "dropped": dropped, **written})
    logger.info("rows %s, dropped %s", rows, dropped)


def _reasons(cleaned: Cleaned) -> str:
    reasons = {"malformed": len(cleaned.quarantine), **cleaned.dropped}
    return (
        " (" + (", ".join(f"{reason} {count}" for reason, count in reasons.items() if count) or "no reason known") + ")"
    )


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("prepare")
