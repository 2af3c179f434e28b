"""The measurements of hours, on the tiny project: they run to their end, and go on from what they have written."""

import shutil
import sys

import pytest

from tasks.core.rows import read_table
from tests.pipeline.conftest import ROOT, Project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CONTROLS = {"null", "base", "human", "best of 2", "best of 4", "best of 8", "best of 16"}
TRAINED = {"ppo", "grpo", "dpo", "top_rated", "raft", "ppo at KL 1.2", "grpo at KL 1.2"}


SHORT_PRESET = """
ppo: {updates: 3, kl_coef: 0.0}
reward: {weights: {praise: 0.1}, rules: {praise: {function: vader, form: sum}}}
evaluate: {vader: false}
overoptimisation: {prompts: 4, samples_per_prompt: 2, samples_per_policy: 1, batch_size: 4, bootstrap_samples: 10}
"""


@pytest.fixture
def project(tiny_copy: Project) -> Project:
    shutil.copytree(ROOT / "benchmarks", tiny_copy.root / "benchmarks", ignore=shutil.ignore_patterns("*.csv"))
    return tiny_copy


def bench(project: Project, name: str, *words: str, expect: int = 0) -> str:
    return project.command(sys.executable, f"benchmarks/{name}.py", *words, expect=expect, timeout=900)


def test_results_of_a_whole_chain(project: Project) -> None:
    first = bench(project, "results", "--seeds", "1")
    assert "ppo less best of 16: " in first
    path = project.root / "benchmarks" / "results.csv"
    lines, text = read_table(path), path.read_text()
    assert {line["row"] for line in lines} == CONTROLS | TRAINED
    assert {line["row"] for line in lines if line["win_rate_cut"]} == TRAINED
    for line in lines:
        wins = [float(rate) for rate in line["wins"].split()]
        assert sum(wins) / len(wins) == pytest.approx(float(line["win_rate"]), abs=1e-3)
    assert bench(project, "results", "--seeds", "1") in first
    assert path.read_text() == text, "nothing is measured again"
    project.edit("params.yaml", "  temperature: 1.0", "  temperature: 0.9")
    shutil.rmtree(project.root / ".rlhf" / "bench-results")
    bench(project, "results", "--seeds", "1")
    assert not {line["settings"] for line in read_table(path)} & {line["settings"] for line in lines}


def test_the_frontier_of_variants_over_seeds(project: Project) -> None:
    words = ("ppo", "ppo, half the learning rate", "dpo", "--seeds", "0", "1")
    first = bench(project, "frontier", *words)
    assert "ppo, seed 1, update 2: " in first
    path = project.root / "benchmarks" / "frontier.csv"
    lines = read_table(path)
    assert [(line["variant"], line["policy_seed"], line["update"]) for line in lines] == [
        *((name, seed, update) for name in words[:2] for seed in "01" for update in "12"),
        ("dpo", "0", "end"), ("dpo", "1", "end"),
    ]  # fmt: skip
    last = {(line["variant"], line["policy_seed"]): float(line["win_rate"]) for line in lines}
    mean_gap = 50 * sum(last[words[1], seed] - last[words[0], seed] for seed in "01")
    assert f"{words[1]}: 2 seeds, " in first
    assert f"; {mean_gap:+.1f} points of win rate (Student " in first
    assert bench(project, "frontier", *words) in first
    assert read_table(path) == lines, "nothing is measured again"


def test_over_optimisation_over_seeds_with_a_cure(project: Project) -> None:
    path = project.root / "infra" / "presets" / "overoptimised.yaml"
    path.write_text(SHORT_PRESET)
    words = ("none", "KL penalty", "--seeds", "0", "1")
    (project.root / "docs").mkdir(exist_ok=True)
    first = bench(project, "overoptimisation", *words)
    table, plot = project.root / "benchmarks" / "overoptimisation.csv", project.root / "docs" / "overoptimisation.svg"
    lines = read_table(table)
    assert [(line["cure"], line["seed"], line["update"]) for line in lines] == [
        (cure, seed, update) for cure in words[:2] for seed in "01" for update in "123"
    ]
    for cure in words[:2]:
        ends = [float(line["gain_proxy"]) for line in lines if (line["cure"], line["update"]) == (cure, "3")]
        assert f"{cure}, 2 seeds: proxy at the end {sum(ends) / 2:.2f} (" in first
    penalty = [line["kl"] for line in lines if line["cure"] == "KL penalty"]
    assert penalty != [line["kl"] for line in lines if line["cure"] == "none"]
    drawn = plot.read_text()
    assert bench(project, "overoptimisation", *words) in first
    assert (read_table(table), plot.read_text()) == (lines, drawn), "nothing is measured again"


def test_contamination_needs_texts_that_are_long_enough(project: Project) -> None:
    assert "no rated texts of 13 words" in bench(project, "contamination", expect=1)
