"""A DVC remote carries data, results and run-cache to another clone, which then computes nothing."""

import shutil
import subprocess
from pathlib import Path

import pytest

from flows.services import free_port
from tests.pipeline.conftest import Project

pytestmark = pytest.mark.slow


@pytest.fixture(params=["folder", "s3"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """Where it is, and an option of it; the keys of the S3 store stand in the environment alone."""
    if request.param == "folder":
        return [str(tmp_path / "remote")]
    s3 = request.getfixturevalue("s3")
    s3.create_bucket(Bucket="store")
    return ["s3://store/project", "endpointurl", s3.meta.endpoint_url]


def with_remote(project: Project, remote: Path | str, *option: str) -> Project:
    """Its data tracked by DVC, a remote elsewhere, everything committed."""
    project.dvc("add", "data.txt")
    project.dvc("remote", "add", "--default", "away", str(remote))
    if option:
        project.dvc("remote", "modify", "away", *option)
    project.rlhf("run", "--push")
    project.ran()
    project.commit()
    return project


def clone(project: Project, to: Path) -> Project:
    subprocess.run(["git", "clone", "--quiet", str(project.root), str(to)], check=True)
    return Project(to, project.python)


def test_a_clone_elsewhere_pulls_and_computes_nothing(project: Project, remote: list[str], tmp_path: Path) -> None:
    with_remote(project, *remote)
    other = clone(project, tmp_path / "elsewhere" / "clone")
    assert not (other.root / "data.txt").exists()
    output = other.rlhf("run", "--pull")
    assert other.ran() == []
    assert "ran" not in output.replace("transferred", "").split()
    for name in ("data.txt", "artifacts/sft/result/data.txt", "artifacts/sft/metrics.json"):
        assert (other.root / name).read_bytes() == (project.root / name).read_bytes()
    assert other.lock() == project.lock()


def test_what_a_clone_computes_comes_back(project: Project, tmp_path: Path) -> None:
    """The run-cache travels, so the first project need not compute what the other has."""
    with_remote(project, tmp_path / "remote")
    other = clone(project, tmp_path / "clone")
    other.rlhf("run", "--pull", "--push", "-S", "sft.epochs=3")
    assert other.ran() == ["sft"]
    output = project.rlhf("run", "--pull", "-S", "sft.epochs=3")
    assert project.ran() == [], output


def test_without_pull_missing_data_is_one_message(project: Project, tmp_path: Path) -> None:
    with_remote(project, tmp_path / "remote")
    other = clone(project, tmp_path / "clone")
    output = other.rlhf("run", expect=1)
    assert "data.txt" in output
    assert "--pull" in output


def test_a_remote_that_does_not_answer_is_one_message(project: Project) -> None:
    """Its own library raises errors of its own kinds."""
    project.dvc("remote", "add", "--default", "away", "s3://store/project")
    project.dvc("remote", "modify", "away", "endpointurl", f"http://127.0.0.1:{free_port()}")
    output = project.rlhf("run", "--pull", "-S", "sft.epochs=3", expect=1)
    assert "the DVC remote cannot be read" in output
    assert project.ran() == []


def test_no_remote_is_one_message_and_nothing_is_lost(project: Project) -> None:
    """When it is read, DVC itself only warns, once a stage, and goes on."""
    assert project.rlhf("run", "--pull", "-S", "sft.epochs=3", expect=1).count("dvc remote add") == 1
    assert project.ran() == []
    assert "dvc remote add" in project.rlhf("run", "--push", expect=1)
    assert project.ran() == ["sft"]
    assert project.rlhf("run").count("cached") == 4


def test_a_remote_that_is_gone_for_a_while_stops_nothing(project: Project, tmp_path: Path) -> None:
    with_remote(project, tmp_path / "remote")
    shutil.rmtree(tmp_path / "remote")
    (tmp_path / "remote").write_text("a file stands in its place")
    output = project.rlhf("run", "--push", "-S", "seed=1", expect=1)
    assert sorted(project.ran()) == ["collect", "gold_judge", "prepare", "sft"]
    assert "warning: not sent to the DVC remote" in output
    (tmp_path / "remote").unlink()
    assert "the DVC remote has everything" in project.rlhf("run", "--push")
    assert project.ran() == []
