"""Variants side by side; seeds: means and intervals by hand, collapsed and failed seeds."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.core.errors import RLHFError, StageError, TrainingError
from tasks.core.rows import write_rows
from tasks.evals import experiments
from tasks.evals.experiments import SeedResult, flat_metrics, summarise_seeds, write_comparison, write_summary


def row(win_rate: float, kl: float = 3.0) -> dict[str, float]:
    interval = {
        "win_rate": win_rate,
        "win_rate_low": round(win_rate - 0.1, 6),
        "win_rate_high": round(win_rate + 0.1, 6),
    }
    return interval | {"gain_gold": 2 * win_rate - 1, "gain_proxy": 1.0, "kl": kl, "length": 9.0}


def trained(ppo: float, dpo: float = 0.6, degenerate: float = 0.0) -> SeedResult:
    table = {"sft": row(0.5, 0.0), "ppo": row(ppo), "dpo": row(dpo)}
    return SeedResult(table, {"ppo": degenerate, "dpo": 0.0}, {"ppo": ["repetition", "truncation"], "dpo": []})


def summary_of(**results: SeedResult | RLHFError) -> dict[str, Any]:
    return summarise_seeds({int(name[1:]): result for name, result in results.items()})


def test_the_mean_and_its_interval_by_hand() -> None:
    """0.6, 0.7, 0.8, 0.9: mean 0.75, s² = 0.05 / 3, s/√4 = 0.064550, t of 3 degrees of freedom is 3.182446."""
    found = summary_of(s0=trained(0.6), s1=trained(0.7), s2=trained(0.8), s3=trained(0.9))
    half = 3.182446 * 0.0645497
    expected = {"seeds": 4, "mean": 0.75, "low": 0.75 - half, "high": 0.75 + half, "min": 0.6, "max": 0.9}
    assert found["policies"]["ppo"]["summary"]["win_rate"] == pytest.approx(expected, abs=1e-6)
    constant = found["policies"]["dpo"]["summary"]["win_rate"]
    assert (constant["low"], constant["mean"], constant["high"]) == (0.6, 0.6, 0.6)
    assert set(found["policies"]) == {"ppo", "dpo"}, "SFT has no seed of its own"
    assert (found["collapsed"], found["failed"]) == ([], [])


def test_other_columns_are_kept_and_those_with_an_interval_are_averaged(tmp_path: Path) -> None:
    results: dict[int, SeedResult | RLHFError] = {}
    for seed, rate in enumerate((0.6, 0.8)):
        more = {"win_rate_finished": rate, "win_rate_finished_low": 0.5, "win_rate_finished_high": 0.9, "new": seed}
        results[seed] = SeedResult({"sft": row(0.5), "ppo": row(rate) | more}, {"ppo": 0.0}, {"ppo": []})
    summary = summarise_seeds(results)["policies"]["ppo"]["summary"]
    assert summary["win_rate_finished"]["mean"] == pytest.approx(0.7)
    assert "new" not in summary
    assert "win_rate_finished_low" not in summary
    write_summary(tmp_path, results)
    (first, second) = csv.DictReader((tmp_path / "seeds.csv").read_text(encoding="utf-8").splitlines())
    assert (first["new"], second["new"], second["win_rate_finished"]) == ("0", "1", "0.8")


def test_two_policies_are_compared_on_the_prompts_of_each_seed() -> None:
    """PPO wins 1, 1, 1, 0 and 1, 1, 0, 0 of four prompts, DPO 1, 0, 0, 0 in both: means ¾, ½ and ¼."""
    first = {"ppo": dict.fromkeys("abc", 1.0) | {"d": 0.0}, "dpo": {"a": 1.0} | dict.fromkeys("bcd", 0.0)}
    second = {"ppo": {"e": 1.0, "f": 1.0, "g": 0.0, "h": 0.0}, "dpo": {"e": 1.0, "f": 0.0, "g": 0.0, "h": 0.0}}
    results = {seed: replace(trained(0.6), wins=wins) for seed, wins in enumerate((first, second))}
    found = summarise_seeds(results)
    assert found["wins"]["ppo"]["mean"] == pytest.approx(0.625)
    difference = found["differences"]["ppo-dpo"]
    assert difference["mean"] == pytest.approx(0.375)
    # Differences 0, 1, 1, 0 and 0, 1, 0, 0: s² = 1/3 and 1/4, mean 7/24; the means' variance 1/32 is less than 7/96.
    assert difference["seed_std"] == 0.0
    assert difference["prompt_std"] == pytest.approx((7 / 24) ** 0.5, abs=1e-6)
    # t of one degree of freedom is 12.706205 (97.5 %) and 1.376382 (80 %).
    assert difference["detectable"] == pytest.approx(14.082587 * (7 / 24 / 8) ** 0.5, rel=1e-5)
    assert flat_metrics(found)["seeds.differences.ppo-dpo.mean"] == pytest.approx(0.375)
    common = summarise_seeds({seed: replace(trained(0.6), wins=first) for seed in (0, 1)})["differences"]["ppo-dpo"]
    assert set(common) == {"mean", "low", "high", "p_value"}, "seeds that share their prompts have no nested components"
    assert summarise_seeds({0: results[0]})["differences"] == {}


def test_one_seed_has_no_interval() -> None:
    found = summary_of(s5=trained(0.6), s6=StageError("no space left on the disk"))
    assert found["policies"]["ppo"]["summary"]["win_rate"] == {
        "seeds": 1, "mean": 0.6, "low": None, "high": None, "min": 0.6, "max": 0.6,
    }  # fmt: skip
    assert "seeds.ppo.win_rate_low" not in flat_metrics(found)
    assert flat_metrics(found)["seeds.ppo.win_rate_mean"] == 0.6


@pytest.mark.parametrize(
    ("high", "degenerate_count", "reason"),
    [
        (0.5, 0.0, None),
        (0.4999, 0.0, "its win rate's whole interval, 30%–50%, lies below one half"),
        (0.8, 1.0, "its last responses are all empty, all the same, or all without an end"),
    ],
)
def test_what_counts_as_collapsed(high: float, degenerate_count: float, reason: str | None) -> None:
    assert experiments.collapse_reason({"win_rate_low": 0.3, "win_rate_high": high}, degenerate_count) == reason


@pytest.mark.parametrize(
    ("lows", "collapsed"),
    [
        ((0.7, 0.72), True),
        ((0.7, 0.6), False),
        ((0.7,), False),
        ((0.7, 0.75, 0.7, 0.5), True),
        ((0.62, 0.6, 0.6), False),
    ],
)
def test_a_seed_that_is_far_below_the_others_has_collapsed_too(lows: tuple[float, ...], collapsed: bool) -> None:
    """Its interval is 55–65 %: better than SFT. One other seed alone does not say which of the two is unusual."""
    others = [{"win_rate_low": low} for low in lows]
    reason = experiments.collapse_reason({"win_rate_low": 0.55, "win_rate_high": 0.65}, 0.0, others)
    assert bool(reason) == collapsed, reason
    assert reason is None or "55%–65%, lies below those of other seeds, which begin at " in reason


def test_a_collapsed_seed_is_named_and_counts_in_the_mean() -> None:
    found = summary_of(s0=trained(0.8), s1=trained(0.2), s2=trained(0.8, degenerate=2.0))
    assert found["collapsed"] == [
        "ppo, seed 1: its win rate's whole interval, 10%–30%, lies below one half",
        "ppo, seed 2: its last responses are all empty, all the same, or all without an end",
    ]
    assert [bool(own["collapsed"]) for own in found["policies"]["ppo"]["seeds"].values()] == [False, True, True]
    assert found["policies"]["ppo"]["summary"]["win_rate"]["mean"] == pytest.approx(0.6)
    assert not any(own["collapsed"] for own in found["policies"]["dpo"]["seeds"].values())


def test_a_failed_seed_is_named_and_is_in_no_mean() -> None:
    found = summary_of(s0=trained(0.8), s1=TrainingError("loss not finite"), s2=StageError("disk is full"))
    assert found["seeds"] == [0, 1, 2]
    assert found["failed"] == ["seed 1: loss not finite", "seed 2: disk is full"]
    assert found["collapsed"] == ["seed 1: its training failed"], "the disk says nothing of the seed"
    assert list(found["policies"]["ppo"]["seeds"]) == ["0"]


def test_what_the_stages_wrote_is_read(tmp_path: Path) -> None:
    for name, content in {
        "evaluate/policies": {"sft": row(0.5), "ppo": row(0.7), "dpo": row(0.6)},
        "ppo/metrics": {"degenerate_count": 1.0, "kl": 3},
        "dpo/metrics": {"pairs": 3},
        "evaluate/findings": {"ppo": [{"detector": "kl_spike"}, {"detector": "kl_spike"}], "dpo": []},
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    answers = [("sft", "a", 0.0), ("ppo", "a", 1.0), ("dpo", "a", 0.0), ("null", "a", 2.0)]
    rows = [{"policy": policy, "prompt_id": prompt, "gold": gold} for policy, prompt, gold in answers]
    write_rows(tmp_path / "evaluate" / "responses.jsonl", rows)
    found = experiments.load_seed_result(tmp_path)
    assert found.wins == {"ppo": {"a": 1.0}, "dpo": {"a": 0.5}}, "what the table does not have is no policy"
    assert found.degenerate_count == {"ppo": 1.0, "dpo": 0.0}
    assert found.table["ppo"]["win_rate"] == 0.7
    assert found.detectors == {"ppo": ["kl_spike"], "dpo": []}


def test_a_row_per_policy_and_seed_and_a_plot_that_names_the_collapsed(tmp_path: Path) -> None:
    results = {3: trained(0.8), 4: trained(0.2), 5: TrainingError("x")}
    write_summary(tmp_path, results)
    rows = list(csv.DictReader((tmp_path / "seeds.csv").read_text(encoding="utf-8").splitlines()))
    assert [(item["policy"], item["seed"], item["win_rate"]) for item in rows] == [
        ("ppo", "3", "0.8"), ("ppo", "4", "0.2"), ("dpo", "3", "0.6"), ("dpo", "4", "0.6"),
    ]  # fmt: skip
    assert [item["detectors"] for item in rows] == ["repetition truncation"] * 2 + [""] * 2
    assert json.loads((tmp_path / "seeds.json").read_text(encoding="utf-8")) == summarise_seeds(results)
    plot = (tmp_path / "seeds.svg").read_text(encoding="utf-8")
    assert "seed 4" in plot
    assert "seed 3" not in plot
    assert "win rate against SFT" in plot
    write_summary(tmp_path, results)
    assert (tmp_path / "seeds.svg").read_text(encoding="utf-8") == plot


def test_nothing_to_show_is_no_error(tmp_path: Path) -> None:
    write_summary(tmp_path, {0: TrainingError("x")})
    assert (tmp_path / "seeds.csv").read_text(encoding="utf-8").startswith("policy,seed,win_rate")


def test_a_row_per_variant_and_policy_without_the_reference(tmp_path: Path) -> None:
    def variant_row(kl: float, gain: float) -> dict[str, float]:
        gains = {f"gain_{judge}{end}": gain for judge in ("gold", "proxy") for end in ("", "_stderr")}
        return row(0.6, kl) | gains | {"win_rate_proxy": 0.8, "reward_gold": 1.0, "reward_proxy": 2.0}

    variants = {
        "β=0.1": {"sft": variant_row(0, 0), "ppo": variant_row(4, 1)},
        "β=0.2": {"sft": variant_row(0, 0), "ppo": variant_row(1, 0.5), "dpo": variant_row(-0.1, 0.2)},
    }
    write_comparison(tmp_path, variants)
    rows = list(csv.DictReader((tmp_path / "variants.csv").read_text(encoding="utf-8").splitlines()))
    assert [(item["variant"], item["policy"], item["kl"]) for item in rows] == [
        ("β=0.1", "ppo", "4"), ("β=0.2", "ppo", "1"), ("β=0.2", "dpo", "-0.1"),
    ]  # fmt: skip
    assert json.loads((tmp_path / "variants.json").read_text(encoding="utf-8")) == variants
    plot = (tmp_path / "reward_against_kl.svg").read_text(encoding="utf-8")
    assert all(name in plot for name in ("β=0.1", "β=0.2", "ppo", "dpo", "by gold", "by proxy"))
    write_comparison(tmp_path, variants)
    assert (tmp_path / "reward_against_kl.svg").read_text(encoding="utf-8") == plot
    write_comparison(tmp_path, {"β=0.1": {"sft": variant_row(0, 0)}})
    (header,) = (tmp_path / "variants.csv").read_text(encoding="utf-8").splitlines()
    assert header.startswith("variant,policy,"), "a sweep of SFT alone has no policy"
