"""Variants side by side."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from tasks.evals.experiments import write_comparison


def row(kl: float, gain: float) -> dict[str, float]:
    judged = {"win_rate": 0.6, "win_rate_low": 0.5, "win_rate_high": 0.7, "win_rate_proxy": 0.8}
    gains = {f"gain_{judge}{end}": gain for judge in ("gold", "proxy") for end in ("", "_stderr")}
    return judged | gains | {"reward_gold": 1.0, "reward_proxy": 2.0, "kl": kl, "length": 9.0}


def test_a_row_per_variant_and_policy_without_the_reference(tmp_path: Path) -> None:
    variants = {
        "β=0.1": {"sft": row(0, 0), "ppo": row(4, 1)},
        "β=0.2": {"sft": row(0, 0), "ppo": row(1, 0.5), "dpo": row(-0.1, 0.2)},
    }
    write_comparison(tmp_path, variants)
    rows = list(csv.DictReader((tmp_path / "variants.csv").read_text(encoding="utf-8").splitlines()))
    assert [(item["variant"], item["policy"], item["kl"]) for item in rows] == [
        ("β=0.1", "ppo", "4"),
        ("β=0.2", "ppo", "1"),
        ("β=0.2", "dpo", "-0.1"),
    ]
    assert json.loads((tmp_path / "variants.json").read_text(encoding="utf-8")) == variants
    plot = (tmp_path / "reward_against_kl.svg").read_text(encoding="utf-8")
    assert all(name in plot for name in ("β=0.1", "β=0.2", "ppo", "dpo", "by gold", "by proxy"))
    write_comparison(tmp_path, variants)
    assert (tmp_path / "reward_against_kl.svg").read_text(encoding="utf-8") == plot
