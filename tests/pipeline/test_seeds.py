"""`rlhf run --seeds`: the project and a variant for every other seed; one that fails or collapses is named."""

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.conftest import DVC_YAML, PATIENCE, PREPARED, STAGE, Project, dvc_stage, query, wait_for

NAMES = ("policies.json", "findings.json", "controls.json", "responses.jsonl")
WRITTEN = "".join(f", artifacts/evaluate/{name}" for name in NAMES)
MORE_STAGES = dvc_stage("ppo", PREPARED, "policy_seed, ppo")
MORE_STAGES += dvc_stage("evaluate", "artifacts/ppo/metrics.json", "seed, evaluate", WRITTEN)

TRAIN = """
    seed = policy_seed
    hold = pathlib.Path({hold!r})
    if seed == 1 and hold.exists():
        hold.with_suffix(".reached").touch()
        time.sleep(60)
    if seed == 2:
        raise TrainingError("the loss is not finite")
"""

WIN_RATES = {0: 0.8, 1: 0.3, 3: 0.7}
COMPARE = f"""
    won = {WIN_RATES}[json.loads((artifacts.ppo / "metrics.json").read_text())["seed"]]
    row = {{"win_rate": won, "win_rate_low": won - 0.1, "win_rate_high": won + 0.1, "gain_gold": won, "kl": 2.0}}
    (out / "policies.json").write_text(json.dumps({{"sft": row, "ppo": row}}))
    (out / "findings.json").write_text(json.dumps({{"ppo": []}}))
    (out / "controls.json").write_text("{{}}")
    answers = [
        {{"policy": policy, "prompt_id": f"{{seed}}/{{n}}", "gold": float(policy == "ppo" and n < 10 * won)}}
        for policy in ("sft", "ppo") for n in range(10)
    ]
    (out / "responses.jsonl").write_text("\\n".join(map(json.dumps, answers)))
"""


@pytest.fixture
def trainable(fresh: Project) -> Project:
    """The toy project with a policy, which fails under seed 2 and loses under seed 1, and its evaluation."""
    begins, ends = "    state = pathlib", "    metrics = "
    ppo = STAGE.format(name="ppo", sections="params, policy_seed: int", reads="artifacts.prepare")
    train = TRAIN.format(hold=str(fresh.root.parent / "hold"))
    (fresh.root / "tasks" / "ppo.py").write_text(ppo.replace(begins, train + begins, 1))
    evaluate = STAGE.format(name="evaluate", sections="params, seed: int", reads="artifacts.ppo")
    (fresh.root / "tasks" / "evaluate.py").write_text(evaluate.replace(ends, COMPARE + ends, 1))
    (fresh.root / "dvc.yaml").write_text(DVC_YAML + MORE_STAGES)
    fresh.commit()
    return fresh


def runs(project: Project) -> Counter[str]:
    return Counter(name for (name,) in query(project.root / "mlflow.db", "select name from runs"))


def written(project: Project) -> list[dict[str, Any]]:
    """What each comparison says, the oldest first."""
    files = sorted((project.root / ".rlhf" / "seeds").glob("*/seeds.json"))
    return [json.loads(path.read_text()) for path in files]


@pytest.mark.slow
def test_every_seed_once_what_they_share_once_and_the_bad_ones_named(trainable: Project) -> None:
    output = trainable.rlhf("run", "--seeds", "4", expect=1)
    assert "variant 3 of 4: policy_seed=2" in output
    assert "collapsed: ppo, seed 1: its win rate's whole interval, 20%–40%, lies below one half" in output
    assert "1 of 4 seeds failed" in output
    assert "seed 2: the loss is not finite" in output
    (found,) = written(trainable)
    seeds = found["policies"]["ppo"]["seeds"]
    assert {int(seed): row["win_rate"] for seed, row in seeds.items()} == WIN_RATES
    summary = found["policies"]["ppo"]["summary"]["win_rate"]
    assert summary["mean"] == pytest.approx((0.8 + 0.3 + 0.7) / 3)
    expected = {"collect": 1, "prepare": 1, "sft": 1, "gold_judge": 1, "ppo": 4, "evaluate": 3, "pipeline": 1}
    assert runs(trainable) == expected | {f"policy_seed={seed}": 1 for seed in (1, 2, 3)}
    assert trainable.worktrees() == set()
    assert "policy_seed: 0" in (trainable.root / "params.yaml").read_text(), "the project itself keeps its seed"
    assert json.loads((trainable.root / "artifacts" / "ppo" / "metrics.json").read_text())["seed"] == 0
    database = trainable.root / "mlflow.db"
    question = "select value from metrics join runs using (run_uuid) where name = 'pipeline' and key = ?"
    assert query(database, question, "seeds.ppo.win_rate_mean") == [(pytest.approx(0.6),)]
    variants = query(database, "select value from tags where key = 'rlhf.variant'")
    assert sorted(variants) == [(f"policy_seed={seed}",) for seed in range(4)]
    assert len(set(query(database, "select value from tags where key = 'rlhf.sweep'"))) == 1


@pytest.mark.slow
def test_seeds_of_all_stages_run_every_stage_that_reads_a_seed(trainable: Project) -> None:
    output = trainable.rlhf("run", "--seeds", "2", "--seeds-of", "all")
    assert "variant 2 of 2: policy_seed=1 seed=1" in output
    each = dict.fromkeys(("collect", "prepare", "sft", "gold_judge", "ppo", "evaluate"), 2)
    assert runs(trainable) == each | {"pipeline": 1, "policy_seed=1 seed=1": 1}
    (found,) = written(trainable)
    # PPO beats SFT on 8 and on 3 of 10 prompts and ties on the others: (0.9 + 0.65) / 2.
    assert found["wins"]["ppo"]["mean"] == pytest.approx(0.775)
    assert {"seed_std", "prompt_std", "detectable"} <= set(found["wins"]["ppo"])
    assert "seed: 0" in (trainable.root / "params.yaml").read_text(), "the project itself keeps its seeds"


@pytest.mark.slow
def test_after_an_interrupt_what_was_computed_is_restored(trainable: Project) -> None:
    hold = Path(trainable.root.parent / "hold")
    hold.touch()
    command = trainable.start("run", "--seeds", "2")
    wait_for(hold.with_suffix(".reached").exists)
    os.killpg(command.pid, signal.SIGINT)
    output, _ = command.communicate(timeout=PATIENCE)
    assert command.returncode == 130, output
    assert trainable.worktrees() == set()
    before = runs(trainable)
    hold.unlink()
    output = trainable.rlhf("run", "--seeds", "2")
    assert runs(trainable) - before == Counter({"ppo": 1, "evaluate": 1, "pipeline, cached": 1, "policy_seed=1": 1})
    assert [found["seeds"] for found in written(trainable)] == [[0], [0, 1]]
    assert "60%" not in output.partition("mean")[2].partition("\n")[0]
    assert "55%" in output.partition("mean")[2].partition("\n")[0], "the mean of 80 % and 30 %"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sft", "--seeds", "2"], "--seeds compares evaluations: name the stage evaluate, too"),
        (["--seeds", "2", "-S", "ppo=null", "-S", "grpo=null", "-S", "dpo=null"], "ppo, grpo and dpo are all off"),
    ],
)
def test_where_there_is_nothing_to_compare_it_says_so(trainable: Project, words: list[str], message: str) -> None:
    assert message in trainable.rlhf("run", *words, expect=1)
    assert trainable.ran() == []


def test_less_than_one_seed_is_refused(fresh: Project) -> None:
    assert "greater than or equal to 1" in fresh.rlhf("run", "--seeds", "0", expect=2)


def test_without_a_commit_nothing_runs(fresh: Project) -> None:
    (fresh.root / "dvc.yaml").write_text(DVC_YAML + MORE_STAGES)
    for words in (["run", "--seeds", "2"], ["sweep", "-S", "seed=1,2"]):
        assert "variants need a git commit" in fresh.rlhf(*words, expect=1)
    assert fresh.ran() == []
