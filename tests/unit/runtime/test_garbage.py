"""Which files of DVC's cache nothing refers to."""

import shutil
import subprocess
from pathlib import Path

import pytest
from dvc.lock import LockError

from flows.cli import garbage as garbage_command
from tasks.core.errors import StageError
from tasks.runtime import dvc_repo, dvc_stages, garbage

ROOT = Path(__file__).resolve().parents[3]
PIPELINE = "stages:\n  sft:\n    cmd: echo\n    deps: [data.txt]\n    outs: [out]\n"
MD5 = {
    "1": "c4ca4238a0b923820dcc509a6f75849b",
    "2": "c81e728d9d4c2f636f067f89cc14862c",
    "3": "eccbc87e4b5ce2fe28308fd9f2a7baf3",
}
"""Text → its md5, by md5sum."""

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # DVC 3.67 with pygtrie 2.6


def git(root: Path, *words: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=root, check=True)


def run(root: Path, text: str) -> str:
    """Let the stage write a folder with this text; the folder's md5."""

    def write() -> None:
        (root / "out").mkdir()
        (root / "out" / "file").write_text(text)

    (root / "data.txt").write_text(text)
    dvc_stages.reproduce("sft", write)
    return dvc_stages.output_digests("sft")["out"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ROOT / ".dvc", tmp_path / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    git(tmp_path, "init", "--quiet", ".")
    monkeypatch.setenv("RLHF_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def unused(keep: set[str]) -> set[str]:
    """The md5s of the unused files, folders left out."""
    found = dvc_repo.unused_objects(keep, [])
    assert all(path.is_file() for path in found)
    return {path.parent.name + path.name for path in found if path.suffix != ".dir"}


def test_workspace_branches_tags_and_what_is_named_stay(project: Path) -> None:
    first = run(project, "1")
    git(project, "add", "-A")
    git(project, "commit", "--quiet", "-m", "one")
    second = run(project, "2")
    run(project, "3")
    assert unused(set()) == {MD5["2"]}
    assert unused({second}) == set(), "a folder's files belong to it"
    assert unused({second, "0" * 32 + ".dir"}) == set(), "what is not here does no harm"
    git(project, "commit", "--quiet", "-am", "three")
    assert unused(set()) == {MD5["1"], MD5["2"]}
    assert unused({first}) == {MD5["2"]}
    git(project, "tag", "here", "HEAD^")
    assert unused(set()) == {MD5["2"]}


def test_a_cache_outside_of_the_project_may_serve_others(
    project: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run(project, "1")
    run(project, "2")
    assert unused(set()) == {MD5["1"]}
    outside = tmp_path_factory.mktemp("outside") / "cache"
    shutil.move(project / ".dvc" / "cache", outside)
    (project / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {outside}\n")
    assert unused(set()) == set()


def test_dvc_is_locked_from_the_listing_until_all_is_freed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else `dvc repro` could restore meanwhile what is about to be deleted."""
    refused = []

    def lock_again(*_args: object) -> list[garbage.Garbage]:
        with pytest.raises(LockError):
            dvc_repo.open_repo().lock._do_lock()
        refused.append(True)
        return [garbage.Garbage("kind", "", ())]

    monkeypatch.setattr(garbage_command, "enter_project_with_services", lambda: None)
    monkeypatch.setattr(garbage, "collect_garbage", lock_again)
    monkeypatch.setattr(garbage.Garbage, "remove", lock_again)
    garbage_command.gc(yes=True)
    assert len(refused) == 3, "the listing, one of its kinds, and the worktrees"
    with dvc_repo.open_repo().lock:
        pass


def test_while_mlflow_has_not_recorded_all_runs_nothing_is_freed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage.mlflow_runs, "connect", lambda: None)
    (root / ".rlhf" / "mlflow_queue").mkdir(parents=True)
    (root / ".rlhf" / "mlflow_queue" / "run.jsonl").write_text("[]\n")
    with pytest.raises(StageError, match="MLflow has not recorded some runs yet"):
        garbage.collect_garbage([])
