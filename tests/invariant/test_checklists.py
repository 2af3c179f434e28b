"""CONTRIBUTING's checklists, followed step by step in a copy: each step left out is named, and all together pass."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, SHIPPED_PARAMS

pytestmark = pytest.mark.exhaustive

STAGE = '''"""Stage toy: count the training prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.core.paths import Artifacts
from tasks.core.rows import Prompt, read_rows, write_json

if TYPE_CHECKING:
    from tasks.config.data import ToyParams

__all__ = ["toy"]


def toy(params: ToyParams, artifacts: Artifacts) -> None:
    """Count the training prompts, `times` times."""
    rows = read_rows(artifacts.prepare / "prompts" / "train.jsonl", Prompt)
    write_json(artifacts.out / "metrics.json", {"prompts": len(rows) * params.times})
    write_json(artifacts.out / "count.json", {"prompts": len(rows) * params.times})


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("toy")
'''
SECTION = '''

class ToyParams(Section):
    """Settings of stage toy."""

    times: Positive = Field(description="How often each prompt counts.")
'''
ENTRY = """  toy:
    cmd: python -m tasks.toy
    deps: [requirements.lock, artifacts/prepare/prompts]
    params: [toy]
    outs: [artifacts/toy/count.json]
    metrics: [artifacts/toy/metrics.json]
plots:
"""


class Copy:
    """A copy of the project, without the user's params.yaml and data."""

    def __init__(self, root: Path) -> None:
        self.root = root
        skipped = shutil.ignore_patterns("__pycache__", "pipeline", "*.pyc")
        for name in ("tasks", "flows", "tests", "scripts", "benchmarks", "custom", "docs", "infra"):
            shutil.copytree(ROOT / name, root / name, ignore=skipped)
        for name in ("dvc.yaml", "pyproject.toml", ".dvcignore", "requirements.lock", "requirements-dev.lock"):
            shutil.copy(ROOT / name, root)
        shutil.copy(SHIPPED_PARAMS, root)

    def edit(self, name: str, old: str, new: str) -> None:
        path = self.root / name
        text = path.read_text(encoding="utf-8")
        assert old in text, f"{name} no longer holds {old!r}"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    def append(self, name: str, text: str) -> None:
        with (self.root / name).open("a", encoding="utf-8") as file:
            file.write(text)

    def python(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], cwd=self.root, capture_output=True, text=True, check=False, encoding="utf-8"
        )
        return f"{done.stdout}{done.stderr}\nstatus {done.returncode}"

    def test(self, *words: str) -> str:
        """What the tests of the copy print."""
        return self.python("-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *words)


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path / "project")


LAWS = "tests/invariant/test_laws.py"
DOCUMENTED = "tests/invariant/test_documented.py"


def test_a_stage(copy: Copy) -> None:
    """The laws name each step that is left out; `-k toy` are those of the stage itself."""
    (copy.root / "tasks" / "toy.py").write_text(STAGE, encoding="utf-8")
    assert "add a stage `toy` to dvc.yaml" in copy.test(LAWS, "-k", "toy")
    copy.edit("dvc.yaml", "plots:\n", ENTRY)
    assert "add `toy` to Params in tasks/config/params.py, and to params.yaml" in copy.test(LAWS, "-k", "toy")
    copy.append("tasks/config/data.py", SECTION)
    copy.edit("tasks/config/params.py", "    gate: evaluation", "    toy: data.ToyParams | None\n    gate: evaluation")
    assert "toy: missing; add it" in copy.test("tests/unit/config/test_params.py", "-k", "preset_resolves")
    copy.append("params.yaml", "toy:\n  times: 2\n")
    shutil.copy(copy.root / "params.yaml", copy.root / "tests" / "support")
    assert "toy: add tasks/toy.py" in copy.python("scripts/stage_deps.py")
    assert "status 0" in copy.python("scripts/stage_deps.py", "--write")
    assert "status 0" in copy.test(LAWS), "all steps are done"
    assert "status 0" in copy.test("tests/unit/config/test_params.py", "-k", "preset_resolves or default")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    params: [toy]\n", "", "add `params` to the stage `toy` in dvc.yaml"),
        ("    params: [toy]\n", "    params: [seed]\n", "add ['toy'] to params of the stage `toy`"),
        ("    outs: [artifacts/toy/count.json]\n", "", "add `outs` to the stage `toy` in dvc.yaml"),
        ("    deps: [requirements.lock, artifacts/prepare/prompts]\n", "", "add `deps` to the stage `toy` in dvc.yaml"),
        (", artifacts/prepare/prompts", "", "add what it reads in artifacts/ of ['prepare'] to deps of `toy`"),
        ("    cmd: python -m tasks.toy\n", "", "add `cmd` to the stage `toy` in dvc.yaml"),
    ],
)
def test_a_part_of_the_entry_that_is_missing_is_named(old: str, new: str, message: str, copy: Copy) -> None:
    (copy.root / "tasks" / "toy.py").write_text(STAGE, encoding="utf-8")
    copy.append("tasks/config/data.py", SECTION)
    copy.edit("tasks/config/params.py", "    gate: evaluation", "    toy: data.ToyParams | None\n    gate: evaluation")
    copy.edit("dvc.yaml", "plots:\n", ENTRY.replace(old, new))
    assert message in copy.test(LAWS, "-k", "toy")


def test_an_entry_without_its_file_is_named(copy: Copy) -> None:
    copy.edit("dvc.yaml", "plots:\n", ENTRY)
    assert "add tasks/toy.py, for dvc.yaml has a stage `toy`" in copy.test(LAWS, "-k", "toy")
    assert "add tasks/toy.py: dvc.yaml has a stage `toy`" in copy.python("scripts/stage_deps.py")


def add_metric(copy: Copy) -> None:
    copy.edit("tasks/rl/grpo.py", "        return experience, {}\n", '        return experience, {"group_size": 2.0}\n')


def add_variant(copy: Copy) -> None:
    copy.edit("tasks/rl/losses.py", '"dr_grpo": torch', '"squared": lengths**2 * responses,\n        "dr_grpo": torch')
    for name in ("tasks/config/rl.py", "tasks/rl/losses.py"):
        copy.edit(name, 'Literal["grpo", ', 'Literal["grpo", "squared", ')


@pytest.mark.parametrize(
    ("add", "missing", "row"),
    [
        (
            add_metric,
            "add a row for ['group_size'] to the table of metrics",
            "| `group_size` | responses to a prompt | responses | constant | look at `grpo.samples_per_prompt` |\n",
        ),
        (add_variant, "add a row for grpo.loss_type: squared", "| `squared` | the square of the length |\n"),
    ],
)
def test_a_metric_and_an_algorithm_variant(add: Callable[[Copy], None], missing: str, row: str, copy: Copy) -> None:
    add(copy)
    assert missing in copy.test(DOCUMENTED)
    copy.edit("docs/ppo.md", "| `kl_coef` |", f"{row}| `kl_coef` |")
    assert "status 0" in copy.test(DOCUMENTED)
    assert "status 0" in copy.test(LAWS, "-k", "mathematics or lower_rooms or held_in_mind")
    assert "status 0" in copy.test("tests/unit/rl/test_losses.py")
