"""A project outside of a clone, by the wheel in an environment of its own, from `rlhf new` to the compared policies."""

from __future__ import annotations

import json
import site
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pipeline.conftest import checked, copy_shipped

pytestmark = pytest.mark.slow

RANDOM = ["--fit", "-S", "base_model.kind=random", "-S", "base_model.pad_token="]

Command = Callable[..., str]
"""(folder, words…) → what `rlhf` of the wheel prints there."""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site-packages of a new environment: the wheel, and all else borrowed from the one of the tests."""
    root = tmp_path_factory.mktemp("wheel")
    copy_shipped(root / "sources", "LICENSE", "NOTICE", "README.md", "prefect.yaml", "pyproject.toml", "setup.py")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    build = [*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", str(root)]
    subprocess.run(build, cwd=root / "sources", check=True)
    (wheel,) = root.glob("*.whl")
    venv.create(root / "venv", symlinks=True)
    (folder,) = root.glob("venv/lib/python*/site-packages")
    # Files of the folders named here are not read as .pth files, so the editable install's finder stays out.
    (folder / "borrowed.pth").write_text("".join(f"{path}\n" for path in site.getsitepackages()))
    options = ["--python", str(root / "venv" / "bin" / "python"), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, *options], check=True)
    return folder


@pytest.fixture
def command(packages: Path, environment: dict[str, str]) -> Command:
    program = packages.parents[2] / "bin" / "rlhf"

    def run(folder: Path, *words: str, expect: int = 0) -> str:
        options = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run([program, *words], check=False, timeout=600, **options)
        return checked(words, done.returncode, done.stdout + done.stderr, expect)

    return run


@pytest.mark.parametrize(
    ("start", "options", "policies"),
    [
        ("film", ["--preset", "tiny"], {"sft", "ppo", "grpo", "dpo"}),
        ("pairs", RANDOM, {"sft", "ppo", "grpo", "dpo"}),
        ("answers", RANDOM, {"sft", "ppo", "grpo"}),
    ],
)
def test_a_new_project_runs(
    start: str, options: list[str], policies: set[str], command: Command, tmp_path: Path
) -> None:
    command(tmp_path, "new", "demo", "--from", start)
    command(tmp_path / "demo", "run", *options)
    shown = json.loads(command(tmp_path / "demo", "show", "--json"))
    assert policies <= set(shown)
    assert "Everything is up to date" in command(tmp_path / "demo", "status")


def test_own_code_and_installed_code_are_inputs(command: Command, packages: Path, tmp_path: Path) -> None:
    command(tmp_path, "new", "demo", "--from", "conversation")
    demo = tmp_path / "demo"
    command(demo, "run", *RANDOM)
    own, code = demo / "custom" / "environments" / "example.py", packages / "tasks" / "grpo.py"
    text, installed = own.read_text(), code.read_text()
    own.write_text(text + "\n# changed\n")
    assert directly_stale(command, demo) == dict.fromkeys(("ppo", "grpo", "evaluate"), "custom/environments")
    own.write_text("import no_such_package\n" + text)
    message = command(demo, "run", expect=1)
    assert "'example:HigherLower' cannot be imported: ModuleNotFoundError: No module named 'no_such_" in message
    own.write_text(text.replace("class HigherLower", "class LowerHigher"))
    assert "custom/environments/example.py defines no 'HigherLower'; there is: " in command(demo, "run", expect=1)
    own.write_text(text)
    code.write_text(installed + "\n# an upgrade\n")
    (demo / "tasks").unlink()  # as after `git clone`
    try:
        assert directly_stale(command, demo) == {"grpo": "tasks/grpo.py"}
    finally:
        code.write_text(installed)
    assert directly_stale(command, demo) == {}
    assert "demo exists and is not empty" in command(tmp_path, "new", "demo", expect=1)


def directly_stale(command: Command, folder: Path) -> dict[str, str]:
    """Stage → its own input that changed, for stages that would run for more than what others will write."""
    found = json.loads(command(folder, "status", "--json"))
    reasons = {row["stage"]: [why for why in row["reasons"] if " changed: " in why] for row in found}
    return {stage: why[0].partition(" changed: ")[0] for stage, why in reasons.items() if why}
