"""Recorded rollouts as a stage writes them, as many as are asked for."""

import random
from pathlib import Path
from typing import Any

from tasks.core.rows import write_rows, write_table

WORDS = ["the", "film", "is", "a", "brilliant", "dull", "mess", "of", "ideas", "and", "never", "finds", "its", "feet"]
TOKENS = 40


def record(
    update: int = 1, group: int = 0, sample: int = 0, tokens: tuple[str, ...] = ("a", "b", ""), **changes: Any
) -> dict[str, Any]:
    """A response of these tokens, whose reward is 1 and stands at the last."""
    numbers = [float(place) for place in range(len(tokens))]
    values = {"advantage": numbers, "kl": numbers[::-1], "reward": [0.0] * (len(tokens) - 1) + [1.0]}
    return {
        "update": update, "group": group, "sample": sample, "prompt": f"prompt {group}", "response": "".join(tokens),
        "ended": True, "score": 1.0, "reward": 1.0, "components": {"learned": 0.5}, "metrics": {}, "kl": 3.0,
        "tokens": list(tokens), "values": values,
    } | changes  # fmt: skip


def write_stage(folder: Path, records: list[dict[str, Any]], truncation: tuple[float, ...] = ()) -> Path:
    """Write records, and a history with these values of a detector; the folder itself."""
    write_rows(folder / "rollouts.jsonl", records)
    rows = [{"step": update, "hacking/truncation": value} for update, value in enumerate(truncation, start=1)]
    write_table(folder / "history.csv", rows, ["step", "hacking/truncation"])
    return folder


def many(count: int, *, group: int, updates: int, seed: int) -> list[dict[str, Any]]:
    """Responses of random words, `TOKENS` tokens each."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        tokens = (*(f" {draw.choice(WORDS)}" for _ in range(TOKENS - 1)), "")
        names = ("advantage", "kl", "reward", "logprob")
        values = {name: [float(f"{draw.gauss(0, 1):.3g}") for _ in tokens] for name in names}
        update, place = 1 + number * updates // count, number // group
        found.append(record(update, place, number % group, tokens, values=values, reward=values["reward"][-1]))
    return found
