"""Files of a project that DVC needs and that are empty, damaged or gone: one message names the file and the cure."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.core.errors import StageError
from tasks.runtime import dvc_stages

ROOT = Path(__file__).resolve().parents[3]
PIPELINE = "stages:\n  sft:\n    cmd: echo {} > out.json\n    deps: [data.txt]\n    metrics: [out.json]\n"
LOCK_CURE = "; `git checkout dvc.lock`, or delete it: `rlhf run` writes it again"

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # DVC 3.67 with pygtrie 2.6


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with one stage, which has run."""
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / ".dvc", root / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    (root / "dvc.yaml").write_text(PIPELINE)
    (root / "data.txt").touch()
    subprocess.run(["git", "init", "--quiet", "."], cwd=root, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_ROOT", str(root))
        patch.chdir(root)
        dvc_stages.reproduce("sft", lambda: (root / "out.json").write_text("{}") and None)
        assert dvc_stages.stale_stages() == []
    return root


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = Path(shutil.copytree(made, tmp_path / "project"))
    monkeypatch.setenv("RLHF_ROOT", str(root))
    monkeypatch.chdir(root)
    return root


def conflict(path: Path) -> None:
    first, *lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([first, "<<<<<<< HEAD\n", *lines]))


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "lock empty": ("dvc.lock", lambda path: path.write_text(""), LOCK_CURE),
    "lock of another kind": ("dvc.lock", lambda path: path.write_text("- a\n"), LOCK_CURE),
    "lock without stages": ("dvc.lock", lambda path: path.write_text("schema: '2.0'\nstages: 3\n"), LOCK_CURE),
    "lock no YAML": ("dvc.lock", lambda path: path.write_text("{["), LOCK_CURE),
    "lock in conflict": ("dvc.lock", conflict, LOCK_CURE),
    "lock cut": ("dvc.lock", lambda path: path.write_text(path.read_text()[:100]), LOCK_CURE),
    "lock of bytes": ("dvc.lock", lambda path: path.write_bytes(b"\xff\xfe\0\0" * 99), LOCK_CURE),
    "lock in UTF-16": ("dvc.lock", lambda path: path.write_text(path.read_text(), encoding="utf-16"), LOCK_CURE),
    "dvc.yaml empty": ("dvc.yaml", lambda path: path.write_text(""), " has no stage: `git checkout dvc.yaml`"),
    "dvc.yaml no YAML": ("dvc.yaml", lambda path: path.write_text("{["), "; `git checkout dvc.yaml`"),
    "no git": (".git", shutil.rmtree, " is no git repository, which DVC needs: `git init` and commit, or `git clone`"),
    "no .dvc": (
        ".dvc",
        shutil.rmtree,
        " is missing: `git checkout .dvc`; where git does not have it either, `dvc init`",
    ),
    "settings damaged": (".dvc/config", lambda path: path.write_text("[["), "; mend it, or `git checkout .dvc`"),
}

CALLS: list[Callable[[], object]] = [
    dvc_stages.graph,
    dvc_stages.stale_stages,
    lambda: dvc_stages.changes("sft"),
    lambda: dvc_stages.reproduce("sft", lambda: None),
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("call", CALLS, ids=["graph", "status", "one stage", "run"])
def test_what_dvc_cannot_read_is_named_with_its_cure(damage: str, call: Callable[[], object], project: Path) -> None:
    name, change, cure = DAMAGES[damage]
    change(project / name)
    with pytest.raises(StageError) as raised:
        call()
    message = str(raised.value)
    if damage == "dvc.yaml empty" and "'sft'" in message:  # what is asked for is not there
        return
    assert message.startswith(str(project if name == ".git" else project / name))
    assert cure in message
    assert "\n" not in message


def test_a_lock_file_that_was_deleted_is_written_again_from_the_cache(project: Path) -> None:
    lock = (project / "dvc.lock").read_bytes()
    (project / "dvc.lock").unlink()
    (project / "out.json").unlink()
    assert dvc_stages.reproduce("sft", lambda: pytest.fail("it must not run")) == "restored"
    assert (project / "dvc.lock").read_bytes() == lock
