"""`rlhf gc`: what nothing refers to is shown and then freed, and everything else stays."""

import re
import shutil
import sqlite3
import sys
from pathlib import Path

import pytest

from tests.pipeline.conftest import PATIENCE, Project, rlhf

pytestmark = pytest.mark.slow

REGISTER = """
import sys
from tasks.runtime import registry
version = registry.register("sft", {"sft/adapter": sys.argv[1]}, {"accepted": "True", "reasons": "good"})
registry.set_champion(version, by="ann")
"""
DELETE = """
from tasks.runtime import mlflow_store, registry
mlflow_store.open_store()[0].delete_registered_model(registry.MODEL)
"""


def rows(output: str) -> dict[str, int]:
    """Kind → number of files."""
    found = re.findall(r"^(\S.*?) {2,}(\d+) {2,}[\d.]+ \w+ ", output, re.MULTILINE)
    return {kind: int(count) for kind, count in found}


def cached(project: Project) -> set[Path]:
    return {path for path in (project.root / ".dvc" / "cache" / "files").rglob("*") if path.is_file()}


def delete_newest_run(project: Project, name: str) -> None:
    """As a person deletes it in MLflow's page."""
    change = "update runs set lifecycle_stage = 'deleted' where run_uuid = (select run_uuid from runs where name = ? "
    with sqlite3.connect(project.root / "mlflow.db") as database:
        database.execute(change + "order by start_time desc limit 1)", [name])
    database.close()


def test_only_what_nothing_refers_to_is_freed(project: Project) -> None:
    first = cached(project)
    assert rows(project.rlhf("gc"))["DVC cache"] == 0
    project.edit("params.yaml", "epochs: 1", "epochs: 3")
    project.rlhf("run", "sft")
    other = cached(project) - first
    (md5,) = [path.parent.name + path.name for path in other if path.name.endswith(".dir")]
    project.edit("params.yaml", "epochs: 3", "epochs: 1")
    project.rlhf("run", "sft")
    assert rows(project.rlhf("gc"))["DVC cache"] == 0, "its run in MLflow refers to it"
    delete_newest_run(project, "sft")
    environment = project.environment | {"PYTHONPATH": str(project.root)}
    project.command(sys.executable, "-c", REGISTER, md5, env=environment)
    assert rows(project.rlhf("gc", "--yes"))["DVC cache"] == 0, "it is the champion's weights"
    project.command(sys.executable, "-c", DELETE, env=environment)
    assert rows(project.rlhf("gc"))["DVC cache"] == len(other) == 2
    assert cached(project) == first | other, "without --yes nothing is changed"
    assert "freed" in project.rlhf("gc", "--yes")
    assert cached(project) == first
    assert "up to date" in project.rlhf("status")
    project.ran()
    shutil.rmtree(project.root / "artifacts")
    project.rlhf("run")
    assert project.ran() == [], "all of it is in the cache"


def test_what_a_branch_or_a_tag_refers_to_stays(project: Project) -> None:
    project.edit("params.yaml", "epochs: 1", "epochs: 3")
    project.rlhf("run", "sft")
    project.commit()
    before = cached(project)
    project.command("git", "tag", "here")
    project.edit("params.yaml", "epochs: 3", "epochs: 1")
    project.rlhf("run", "sft")
    project.commit()
    for _ in range(2):
        delete_newest_run(project, "sft")
    project.rlhf("gc", "--yes")
    assert cached(project) == before
    project.command("git", "tag", "--delete", "here")
    project.rlhf("gc", "--yes")
    assert cached(project) < before


def test_local_state_that_no_run_needs_is_freed(project: Project) -> None:
    state = project.root / ".rlhf"
    process = project.start_and_hold("run")
    process.kill()
    process.communicate(timeout=PATIENCE)
    project.wait_for_end()
    (kept,) = (state / "checkpoints" / "sft").iterdir()
    unused = [
        state / "checkpoints" / "sft" / ("0" * 64),
        state / "checkpoints" / "gone" / "key",
        state / "downloads" / "x",
    ]
    for folder in unused:
        folder.mkdir(parents=True)
        (folder / "file").write_text("12345")
    (state / "mlflow_queue").mkdir(exist_ok=True)
    (state / "mlflow_queue" / "a.refused").touch()
    project.commit()
    left = state / "sweeps" / "1" / "worktree"
    project.command("git", "worktree", "add", "--quiet", "--detach", str(left), "HEAD")
    output = rlhf(project, "gc", "--yes")
    assert rows(output) == {"DVC cache": 0, "checkpoints": 2, "downloads": 1, "MLflow queue": 1, "worktrees": 1}
    assert not any(path.exists() for path in (*unused, left, state / "mlflow_queue" / "a.refused"))
    assert kept.exists()
    assert project.worktrees() == set()
    project.check_resumed()


def test_a_cache_that_others_may_use_is_left_alone(project: Project, tmp_path: Path) -> None:
    shutil.move(project.root / ".dvc" / "cache", tmp_path / "cache")
    project.dvc("config", "--local", "cache.dir", str(tmp_path / "cache"))
    project.edit("params.yaml", "epochs: 1", "epochs: 3")
    project.rlhf("run", "sft")
    before = sorted((tmp_path / "cache").rglob("*"))
    project.edit("params.yaml", "epochs: 3", "epochs: 1")
    project.rlhf("run", "sft")
    delete_newest_run(project, "sft")
    assert rows(project.rlhf("gc", "--yes"))["DVC cache"] == 0
    assert sorted((tmp_path / "cache").rglob("*")) == before
