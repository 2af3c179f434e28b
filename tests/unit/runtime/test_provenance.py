"""Provenance of a registered version."""

import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from flows import experiments
from flows.experiments import reproduce
from tasks.core.errors import StageError
from tasks.runtime import provenance
from tasks.runtime.provenance import PROVENANCE_TAG, Provenance, StageRecord, provenance_of
from tasks.runtime.registry import Version

ORIGINS = {
    "params": "seed: 0\n",
    "parameters": {"seed": 0},
    "commit": "1234",
    "uncommitted": (),
    "pipeline_run": "r",
    "stages": {"sft": StageRecord(key="k", run="", outputs={"artifacts/sft/adapter": "m.dir"})},
    "base_model": {},
    "sources": [],
    "metrics": {},
    "rule_results": (),
}


def version(tags: dict[str, str]) -> Version:
    return Version(4, "ppo", {}, tags, (), datetime.now(UTC))


def made(**changes: object) -> Version:
    return version({PROVENANCE_TAG: Provenance.model_validate(ORIGINS | changes).model_dump_json()})


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLHF_ROOT", str(tmp_path))
    for name in ("dvc.yaml", "params.yaml", "tasks/a.py", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("first\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    return tmp_path


def test_it_comes_back_as_it_was_and_finds_the_md5_of_an_output() -> None:
    found = provenance_of(made())
    assert found == Provenance.model_validate(ORIGINS)
    assert found.md5_of("artifacts/sft/adapter") == "m.dir"
    with pytest.raises(StageError, match=r"no stage wrote artifacts/sft/history\.csv"):
        found.md5_of("artifacts/sft/history.csv")
    with pytest.raises(StageError, match="version 4 has no provenance"):
        provenance_of(version({}))


@pytest.mark.parametrize("name", ["tasks/a.py", "dvc.yaml", "tasks/new.py", "data/new.jsonl"])
def test_changed_code_and_data_are_named(project: Path, name: str) -> None:
    assert provenance._uncommitted() == ()
    (project / name).parent.mkdir(exist_ok=True)
    (project / name).write_text("second\n")
    (changed,) = provenance._uncommitted()
    assert name.startswith(changed), "a new folder is named as a whole"


def test_parameters_and_prose_may_be_as_they_like(project: Path) -> None:
    for name in ("params.yaml", "README.md"):
        (project / name).write_text("second\n")
    assert provenance._uncommitted() == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"uncommitted": ["tasks/a.py"]}, r"changes that were not committed \(tasks/a.py\)"),
        ({"commit": ""}, "git had no commit"),
        ({"commit": "0" * 40}, "commit 0{40}, which is not here: `git fetch`"),
    ],
)
def test_what_cannot_be_made_again_is_refused(project: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(StageError, match=message):
        reproduce(made(**changes))


def test_what_differs_from_where_it_was_made_is_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(**machine: str) -> StageRecord:
        return StageRecord(key="k", run="r", outputs={}, machine=machine)

    stages = {"a": stage(cpu="A", torch="2", mkl="1"), "b": stage(cpu="B", torch="2"), "c": stage()}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project, capture_output=True, text=True, check=True)
    origin = provenance_of(made(stages=stages, commit=commit.stdout.strip()))
    monkeypatch.setattr(experiments, "describe_machine", lambda: {"cpu": "A", "torch": "2", "new": "1"})
    assert experiments.differences(origin) == ["cpu was A, B, here A", "mkl was 1, here none"]
    (project / "requirements.lock").write_text("torch==2\n")
    subprocess.run(["git", "add", "-A"], cwd=project, check=True)
    assert experiments.differences(origin)[-1] == "requirements.lock was another one: install that"
