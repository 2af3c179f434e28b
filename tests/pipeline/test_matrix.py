"""The cache is never wrong: change any input of any stage, and exactly the stages that read it have to run.

What a stage reads is found without dvc.yaml: from the signature of its function, and from what its process imports.
`python -m pytest tests/pipeline/test_matrix.py -rP -m ''` prints the matrix.
"""

import ast
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from tasks.runtime.dvc_stages import why_stale
from tests.pipeline.conftest import ROOT, Project

# DVC's own, in the process of the tests.
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")

STAGES = list(YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"])


def sections_of(stage: str) -> set[str]:
    """The sections of params.yaml that the stage's function is given: its parameters before `artifacts`."""
    tree = ast.parse((ROOT / "tasks" / f"{stage}.py").read_text(encoding="utf-8"))
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == stage)
    return {stage if argument.arg == "params" else argument.arg for argument in function.args.args[:-1]}


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not children:
        yield path
    for key, inner in children:
        yield from leaves(inner, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def other(value: Any) -> Any:
    """Something else of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return f"{value}x" if isinstance(value, str) else "x"


def brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


@pytest.fixture(scope="module")
def recorded(tiny: tuple[Project, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A copy of the finished tiny project, in which `dvc_stages` works."""
    project = tiny[0].copy(tmp_path_factory.mktemp("matrix") / "project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.root)
        yield project


def direct() -> dict[str, tuple[str, ...]]:
    """The stages of which an input of their own has changed, with the reasons."""
    own = {stage.name: tuple(why_stale(stage)) for stage in Repo(".").index.stages if not stage.is_data_source}
    return {stage: why for stage, why in own.items() if why}


def direct_with(file: Path, content: bytes, name: str) -> dict[str, tuple[str, ...]]:
    """`direct` while the file has this content; printed as a row of the matrix."""
    before = file.read_bytes()
    file.write_bytes(content)
    found = direct()
    file.write_bytes(before)
    print(f"{name:<60}" + " ".join("■" if stage in found else "·" for stage in STAGES))
    return found


@pytest.mark.exhaustive
def test_every_parameter(recorded: Project) -> None:
    """Also: the reason names the parameter, its old value and its new one."""
    yaml = YAML(typ="safe")
    original = yaml.load(recorded.root / "params.yaml")
    readers = {stage: sections_of(stage) for stage in STAGES}
    assert direct() == {}
    for leaf in leaves(original):
        values, before, name = deepcopy(original), at(original, leaf), ".".join(map(str, leaf))
        at(values, leaf[:-1])[leaf[-1]] = other(before)
        text = StringIO()
        yaml.dump(values, text)
        found = direct_with(recorded.root / "params.yaml", text.getvalue().encode(), name)
        assert set(found) == {stage for stage in STAGES if leaf[0] in readers[stage]}, name
        for why in found.values():
            assert why == (f"{name}: {brief(before)} → {brief(other(before))}",)


@pytest.mark.exhaustive
def test_every_module(recorded: Project) -> None:
    """What a stage's process imports of ours is what it depends on; the flows and everything else runs nothing."""
    for file in sorted((recorded.root / "tasks").rglob("*.py")):
        name = file.relative_to(recorded.root).as_posix()
        text = file.read_bytes()
        found = direct_with(file, text + b"\n# changed\n", name)
        md5s = [hashlib.md5(content).hexdigest()[:8] for content in (text, text + b"\n# changed\n")]
        for (reason,) in found.values():
            path, _, change = reason.partition(" changed: ")
            assert (name == path and change == f"{md5s[0]} → {md5s[1]}") or name.startswith(f"{path}/"), reason
        for stage in STAGES:
            if name in imported(stage):
                assert stage in found, f"{stage} imports {name}"
    for name in ("flows/pipeline.py", "flows/cli/main.py", "prefect.yaml", "infra/presets/tiny.yaml"):
        file = recorded.root / name
        if file.exists():
            assert direct_with(file, file.read_bytes() + b"\n# changed\n", name) == {}


@pytest.mark.exhaustive
def test_the_lock_of_the_libraries_is_read_by_every_stage(recorded: Project) -> None:
    lock = recorded.root / "requirements.lock"
    assert set(direct_with(lock, lock.read_bytes().replace(b"torch==", b"torch==9"), lock.name)) == set(STAGES)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("evaluate.bootstrap_samples=77", ["evaluate"]),
        ("dpo.beta=0.3", ["dpo", "evaluate"]),
        ("ppo.kl_coef=0.3", ["ppo", "evaluate"]),
        ("gate.max_kl=3", []),
        ("reward.weights.length=0.1", ["ppo", "grpo", "evaluate"]),
        ("preferences.heldout_pairs=5", ["preferences", "reward_model", "evaluate"]),
    ],
)
def test_what_then_runs(tiny_copy: Project, change: str, expected: list[str]) -> None:
    """Really run: a stage after it runs only if what it reads has come out different."""
    output = tiny_copy.rlhf("run", "-S", change)
    ran = [line.split()[1] for line in output.splitlines() if line.startswith("✓") and line.split()[2] == "ran"]
    assert set(ran) <= set(versioning_closure(expected)), output
    assert set(expected) - set(ran) <= {"evaluate", "reward_model"}, output
    assert tiny_copy.rlhf("run").count("cached") == len(STAGES)


def versioning_closure(stages: list[str]) -> set[str]:
    """These stages and all after them."""
    outs = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
    found = set(stages)
    for stage in STAGES:
        if any(dep.startswith(f"artifacts/{before}/") for dep in outs[stage]["deps"] for before in found):
            found.add(stage)
    return found


@pytest.mark.exhaustive
def test_a_changed_byte_of_an_output_is_restored(tiny_copy: Project) -> None:
    """In the workspace; in the cache it is noticed, removed and computed again: see test_faults.py."""
    lock = tiny_copy.lock()
    weights = tiny_copy.root / "artifacts" / "sft" / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    assert "✓ sft              restored" in tiny_copy.rlhf("run")
    assert tiny_copy.lock() == lock


@cache
def imported(stage: str) -> set[str]:
    """The files of the project that importing the stage imports, relative to the root."""
    code = f"import sys, tasks.{stage}\nfor module in [*sys.modules.values()]: print(getattr(module, '__file__', ''))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    files = {Path(line) for line in done.stdout.splitlines() if line.startswith(str(ROOT / "tasks"))}
    return {file.relative_to(ROOT).as_posix() for file in files if file.name != "__init__.py"}
