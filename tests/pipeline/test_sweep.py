"""`rlhf sweep`: every combination once, in worktrees that share one cache."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
from filelock import FileLock

from flows.experiments import _working_copy, expand_grid
from flows.worktrees import worktree
from tasks.core.errors import ConfigError
from tests.pipeline.conftest import Project, query


@pytest.mark.slow
def test_every_variant_once_and_what_they_share_once(fresh: Project) -> None:
    """Also: data that git does not have come from the cache."""
    fresh.dvc("add", "data.txt")
    fresh.commit()
    fresh.edit("tasks/shared.py", '"a"', '"not committed"')
    before = (fresh.root / "params.yaml").read_text()
    output = fresh.rlhf("sweep", "-S", "sft.epochs=2,3")
    assert "variant 2 of 2: sft.epochs=3" in output
    database = fresh.root / "mlflow.db"
    runs = Counter(name for (name,) in query(database, "select name from runs"))
    stages = {"collect": 1, "prepare": 1, "gold_judge": 1, "sft": 2}
    assert runs == stages | {"sft.epochs=2": 1, "sft.epochs=3": 1}
    sweeps = query(database, "select value from tags where key = 'rlhf.sweep'")
    assert (len(sweeps), len(set(sweeps))) == (2, 1)
    assert (fresh.root / "params.yaml").read_text() == before
    assert not (fresh.root / "artifacts").exists(), "the project itself is left alone"
    assert fresh.worktrees() == set()
    fresh.rlhf("run", "-S", "sft.epochs=3")
    assert fresh.ran() == [], "all of it was in the cache"
    assert "not committed" in (fresh.root / "artifacts/sft/result/data.txt").read_text()


@pytest.mark.slow
def test_a_variant_that_fails_is_named_and_those_before_it_are_kept(fresh: Project) -> None:
    fresh.commit()
    assert "variant sft.epochs=-1 failed" in fresh.rlhf("sweep", "-S", "sft.epochs=2,-1", expect=1)
    assert fresh.worktrees() == set()
    fresh.rlhf("run", "-S", "sft.epochs=2")
    assert fresh.ran() == []


def test_links_and_repositories_in_the_project_are_links_in_its_copies(
    fresh: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh.commit()
    monkeypatch.chdir(fresh.root)
    (tmp_path / "rows.jsonl").write_text("rows")
    (fresh.root / "linked").symlink_to(tmp_path)
    fresh.command("git", "init", "--quiet", "repository")
    (fresh.root / "repository" / "rows.jsonl").write_text("rows")
    (fresh.root / "new.txt").write_text("new")
    with _working_copy(fresh.root / ".rlhf" / "sweeps" / "worktree") as copy:
        assert [(copy / name / "rows.jsonl").read_text() for name in ("linked", "repository")] == ["rows", "rows"]
        assert (copy / "new.txt").read_text() == "new"


def test_worktrees_that_a_killed_process_has_left_are_removed(fresh: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in which somebody works stay: the process that made one, or a run that outlived it."""
    fresh.commit()
    monkeypatch.chdir(fresh.root)
    folders = {name: fresh.root / ".rlhf" / "sweeps" / name for name in ("left", "gone", "made", "running", "new")}
    for name in ("left", "gone", "made", "running"):
        fresh.command("git", "worktree", "add", "--detach", "--quiet", str(folders[name]), "HEAD")
    shutil.rmtree(folders["gone"])
    (folders["running"] / ".rlhf").mkdir()
    made = folders["made"].with_name("made.lock")
    with FileLock(made), FileLock(folders["running"] / ".rlhf" / "run.lock"), worktree(folders["new"], "HEAD"):
        assert fresh.worktrees() == {"made", "running", "new"}
    assert fresh.worktrees() == {"made", "running"}
    with worktree(folders["new"], "HEAD"):
        assert fresh.worktrees() == {"new"}
    assert list(folders["new"].parent.iterdir()) == []


def test_combinations() -> None:
    assert expand_grid(["a.b=1,2", "c=x"]) == [("a.b=1", "c=x"), ("a.b=2", "c=x")]
    assert expand_grid(["a=[1,2],{b: 3, c: 4}"]) == [("a=[1,2]",), ("a={b: 3, c: 4}",)]
    for incomplete in ("a", "=1"):
        with pytest.raises(ConfigError):
            expand_grid([incomplete])
