"""`rlhf run --ranks 2`: two processes that share the work, by gloo, against one."""

import csv
import json
import os
import signal

import pytest

from tests.pipeline.conftest import PATIENCE, Project, query, wait_for

pytestmark = pytest.mark.slow

SHARED = ["sft", "reward_model", "gold_judge", "ppo", "grpo", "dpo"]


def figures(project: Project, stage: str) -> dict[str, float]:
    """The stage's metrics and every number of its curves."""
    folder = project.root / "artifacts" / stage
    found = {f"final {key}": value for key, value in json.loads((folder / "metrics.json").read_text()).items()}
    with (folder / "history.csv").open() as file:
        for row in csv.DictReader(file):
            found |= {f"step {row['step']} {key}": float(value) for key, value in row.items() if value}
    return found


def files(project: Project, stage: str) -> set[str]:
    folder = project.root / "artifacts" / stage
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_two_ranks_find_what_one_finds_and_rank_0_writes(tiny: tuple[Project, str], tiny_copy: Project) -> None:
    alone, project = tiny[0], tiny_copy
    (project.root / "mlflow.db").unlink()
    project.rlhf("run", *SHARED, "--force", "--ranks", "2")
    for stage in SHARED:
        assert figures(project, stage) == pytest.approx(figures(alone, stage), rel=1e-4, abs=1e-6), stage
        assert files(project, stage) == files(alone, stage)
    asked = "select name, status, value from runs join tags using (run_uuid) where key = 'rlhf.ranks'"
    found = sorted(query(project.root / "mlflow.db", asked))
    assert found == sorted((stage, "FINISHED", "2") for stage in SHARED), "one run each"


def test_what_ranks_cannot_share_is_one_message(tiny_copy: Project) -> None:
    before = tiny_copy.lock()
    output = tiny_copy.rlhf("run", "sft", "--ranks", "2", "-S", "sft.batch_size=3", expect=1)
    assert "error: batch_size is 3, which 2 ranks cannot share equally; change it or --ranks" in output
    assert tiny_copy.lock() == before
    assert "choose one" in tiny_copy.rlhf("run", "--ranks", "2", "--parallel", "2", expect=1)


def test_ranks_end_with_the_run_and_the_next_one_goes_on(tiny_copy: Project) -> None:
    project = tiny_copy
    process = project.start("run", "ppo", "--ranks", "2", "-S", "ppo.updates=6")
    checkpoints = project.root / ".rlhf" / "checkpoints"
    wait_for(lambda: any(checkpoints.rglob("checkpoint-*/whole.json")))
    assert sum("flows.executor" in " ".join(member.cmdline()) for member in project.processes()) == 3
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    project.wait_for_end()
    assert "goes on from update" in project.rlhf("run", "ppo", "--ranks", "2")
