"""The five laws that keep the project one thing; each failure says what to change."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

from tasks.core.params import Params

ROOT = Path(__file__).resolve().parents[2]
PIPELINE: dict[str, Any] = YAML(typ="safe").load(ROOT / "dvc.yaml")
STAGES = list(PIPELINE["stages"])
MODULES = sorted([*ROOT.glob("flows/**/*.py"), *ROOT.glob("tasks/**/*.py")])

# What a stage imports is an input of its key: a change of these must never run a stage again.
DVC = {f"tasks/runtime/{name}.py" for name in ("dvc_repo", "dvc_reproduce", "dvc_stages")}
MLFLOW = {f"tasks/runtime/{name}.py" for name in ("mlflow_runs", "mlflow_store", "registry")}
RUNNERS = {module.relative_to(ROOT).as_posix() for module in (ROOT / "tasks" / "runtime").glob("*.py")}

DOORS = {
    "prefect": {f"flows/{name}.py" for name in ("pipeline", "retrain", "schedule", "services")},
    "mlflow": MLFLOW,
    "dvc": DVC,
    "ruamel": {"tasks/core/params.py"},
    "openai": {"tasks/evals/judges.py"},
    "yaml": set[str](),
}

# Written with tensors alone, so that they can be read beside the papers and tested without a model.
PURE = ["actions", "advantages", "checks", "control", "kl", "losses", "masking", "shaping"]


def name_of(module: Path) -> str:
    return module.relative_to(ROOT).with_suffix("").as_posix()


def imports(module: Path) -> Iterator[str]:
    """Every dotted name that the module imports, wherever in it; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(module)}:{node.lineno}: write the import with its full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(name: str) -> int | None:
    """0 core, 1 the libraries of stages, 2 stages, 3 flows; None for what is not ours."""
    parts = name.split(".")
    if parts[0] == "flows":
        return 3
    if parts[0] != "tasks" or len(parts) == 1:
        return None
    return {"core": 0, "runtime": 1, "rl": 1, "rewards": 1, "evals": 1, "data": 1, "labelling": 1}.get(parts[1], 2)


def stage_function(stage: str) -> Any:
    return getattr(importlib.import_module(f"tasks.{stage}"), stage)


# -- law 1: one name, every place ------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_one_name_everywhere(stage: str) -> None:
    entry = PIPELINE["stages"][stage]
    camel = stage.title().replace("_", "").removesuffix("Params")
    section = Params.model_fields[stage].annotation
    section = next(kind for kind in get_args(section) or [section] if kind is not NoneType)
    assert section.__name__.lower() == f"{camel}Params".lower(), f"the section {stage!r} has class {section.__name__}"
    assert (ROOT / "tasks" / f"{stage}.py").is_file()
    assert callable(stage_function(stage))
    assert entry["cmd"] == f"python -m tasks.{stage}", "DVC hashes cmd: launchers and options never go into it"
    written = [*entry.get("outs", []), *entry.get("metrics", []), *entry.get("plots", [])]
    assert all(isinstance(path, str) for path in written), "persist or cache: false would turn the run-cache off"
    assert all(path.startswith(f"artifacts/{stage}/") for path in written)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_by_its_own_name_when_called_alone(stage: str) -> None:
    last = ast.parse((ROOT / "tasks" / f"{stage}.py").read_text(encoding="utf-8")).body[-1]
    assert ast.unparse(last) == (
        f"if __name__ == '__main__':\n    from tasks.runtime.stage_runner import run_stage\n    run_stage('{stage}')"
    ), f"tasks/{stage}.py must end by running itself, with the import inside: it is no input of the stage"


# -- law 2: imports point one way ------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_imports_point_one_way(module: Path) -> None:
    here = layer(name_of(module).replace("/", "."))
    for name in imports(module):
        there = layer(name)
        if here is None or there is None:
            continue
        assert there <= here, f"{name_of(module)} imports {name}: only what lies below may be imported"
        is_itself = name.startswith(name_of(module).replace("/", "."))
        assert not (here == there == 2) or is_itself, f"{name_of(module)} imports {name}: stages exchange files"


@pytest.mark.parametrize("stage", STAGES)
def test_a_change_of_how_stages_are_run_runs_none_again(stage: str) -> None:
    assert not RUNNERS & set(PIPELINE["stages"][stage]["deps"])


# -- law 3: one door per vendor --------------------------------------------------------------------------------


@pytest.mark.parametrize("vendor", DOORS)
def test_one_door_per_vendor(vendor: str) -> None:
    users = {module for module in MODULES if any(name.split(".")[0] == vendor for name in imports(module))}
    assert {f"{name_of(module)}.py" for module in users} == DOORS[vendor]


def test_every_library_that_is_imported_is_declared() -> None:
    """One that only comes along with another may go away with its next release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = chain.from_iterable(project["optional-dependencies"].values())
    declared = {canonicalize_name(Requirement(line).name) for line in [*project["dependencies"], *extras]}
    known, tops = packages_distributions(), {name.split(".")[0] for module in MODULES for name in imports(module)}
    libraries = sorted(tops - sys.stdlib_module_names - {"flows", "tasks"})
    assert [name for name in libraries if declared.isdisjoint(map(canonicalize_name, known.get(name, [])))] == []


@pytest.mark.parametrize("name", PURE)
def test_the_mathematics_of_rl_imports_torch_alone(name: str) -> None:
    ours = ("tasks.rl", "tasks.core.errors", "tasks.core.words")
    allowed = ("torch", *ours, "__future__", "collections", "dataclasses", "math", "typing")
    for used in imports(ROOT / "tasks" / "rl" / f"{name}.py"):
        assert any(f"{used}.".startswith(f"{known}.") for known in allowed), f"tasks/rl/{name}.py imports {used}"


# -- law 4: dvc.yaml is the one graph --------------------------------------------------------------------------


def test_dvc_yaml_lists_every_module_that_a_stage_imports() -> None:
    script = [sys.executable, "infra/stage_deps.py"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_walk_follows_every_kind_of_import_and_skips_what_never_runs(tmp_path: Path) -> None:
    files = {
        "__init__.py": '"""Only a docstring."""\n',
        "a.py": "import tasks.b\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import tasks.unused\n"
        "def f():\n    from tasks.sub import c\nif __name__ == '__main__':\n    import tasks.unused\n",
        "b.py": "from tasks.d import something\n",
        "d.py": "something = 1\n",
        "unused.py": "",
        "sub/__init__.py": "value = 1\n",
        "sub/c.py": "",
    }
    for name, text in files.items():
        (tmp_path / "tasks" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tasks" / name).write_text(text)
    spec = importlib.util.spec_from_file_location("stage_deps", ROOT / "infra" / "stage_deps.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    expected = ["tasks/a.py", "tasks/b.py", "tasks/d.py", "tasks/sub/__init__.py", "tasks/sub/c.py"]
    assert module.closure(tmp_path / "tasks" / "a.py", tmp_path) == expected


@pytest.mark.parametrize("stage", STAGES)
def test_the_signature_says_what_dvc_yaml_says(stage: str) -> None:
    parameters = inspect.signature(stage_function(stage)).parameters.values()
    folders = {item.name for item in parameters if item.kind is item.KEYWORD_ONLY}
    sections = {stage if item.name == "params" else item.name for item in parameters if item.name not in folders}
    entry = PIPELINE["stages"][stage]
    assert set(entry["params"]) == sections
    read = {dep.split("/")[1] for dep in entry["deps"] if dep.startswith("artifacts/")}
    assert read == folders - {"out"}, "the folders that a stage is given and those that its deps name differ"


def test_what_a_stage_reads_another_stage_writes() -> None:
    written = [path for entry in PIPELINE["stages"].values() for path in [*entry["outs"], *entry.get("metrics", [])]]
    for stage, entry in PIPELINE["stages"].items():
        for dep in entry["deps"]:
            made = any(dep == path or dep.startswith(f"{path}/") for path in written)
            assert made == dep.startswith("artifacts/"), f"{stage} reads {dep}, which no stage writes"


def test_what_scores_reads_the_folder_of_users_rewards() -> None:
    reads = {"tasks/rewards/composition.py": set[str](), "tasks/rewards/custom": set[str]()}
    for stage, entry in PIPELINE["stages"].items():
        for path, readers in reads.items():
            readers |= {stage} if path in entry["deps"] else set()
    scores, knows = reads.values()
    assert scores == knows, "imported by name, so no walk over imports finds it: list it in dvc.yaml by hand"
    assert "__pycache__/" in (ROOT / ".dvcignore").read_text().split(), "else running a stage would change the folder"


@pytest.mark.parametrize("module", sorted(ROOT.glob("flows/**/*.py")), ids=name_of)
def test_no_flow_lists_the_stages_a_second_time(module: Path) -> None:
    strings = [node.value for node in ast.walk(ast.parse(module.read_text("utf-8"))) if isinstance(node, ast.Constant)]
    named = {text for text in strings if isinstance(text, str) and text in STAGES}
    assert named <= {"evaluate"}, f"{name_of(module)} names {named}; dvc.yaml is where stages are listed"


# -- law 5: stages exchange files ------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_a_plain_function_of_parameters_and_paths(stage: str) -> None:
    signature = inspect.signature(stage_function(stage))
    assert signature.return_annotation == "None", "a stage returns nothing: it writes files"
    for item in signature.parameters.values():
        if item.kind is item.KEYWORD_ONLY:
            assert item.annotation == "Path"
        else:
            section = item.annotation.removesuffix(" | None")
            assert item.annotation == "int" or section.endswith("Params"), f"{stage}({item})"
        assert item.default is item.empty, f"{stage}({item}): a default would be a parameter that DVC cannot see"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_module_only_defines(stage: str) -> None:
    tree = ast.parse((ROOT / "tasks" / f"{stage}.py").read_text(encoding="utf-8"))
    plain = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.If)
    for node in tree.body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert docstring or isinstance(node, plain), f"tasks/{stage}.py:{node.lineno} does something at import"
