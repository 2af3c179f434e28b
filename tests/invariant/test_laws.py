"""Six laws that keep the project in one piece; each failure names what to change."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
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

from tasks.config.params import Params
from tests.conftest import SHIPPED_PARAMS

ROOT = Path(__file__).resolve().parents[2]
PIPELINE: dict[str, Any] = YAML(typ="safe").load(ROOT / "dvc.yaml")
STAGES = list(PIPELINE["stages"])
FILES = sorted(path.stem for path in ROOT.glob("tasks/*.py") if path.stem != "__init__")
MODULES = sorted([*ROOT.glob("flows/**/*.py"), *ROOT.glob("tasks/**/*.py")])

DOORS = {
    "prefect": {
        f"flows/{name}.py"
        for name in ("pipeline", "prefect_runs", "retrain", "schedule", "services", "temporary_server")
    },
    "mlflow": {
        f"tasks/runtime/{name}.py"
        for name in ("mlflow_pipeline", "mlflow_runs", "mlflow_store", "mlflow_traces", "registry")
    },
    "dvc": {f"tasks/runtime/{name}.py" for name in ("dvc_repo", "dvc_stages")},
    "ruamel": {"tasks/config/params.py", "tasks/config/yaml_text.py"},
    "openai": {"tasks/evals/llm_judge.py"},
    "yaml": set[str](),
}

# Written with tensors alone, so that they can be read beside the papers and tested without a model.
PURE = ["advantages", "hacking", "kl", "losses", "masking"]

# Packages from the lowest to the highest. A module imports from its own package and from lower ones.
ROOMS = [
    "core",
    "config",
    "data",
    "runtime",
    "models",
    "rewards",
    "rl",
    "evals",
    "labelling",
    "serving",
    "stages",
    "flows",
]

# Config modules that are inputs of stages: names that libraries share, and the defaults of rules, which need no entry
# in params.yaml. Every other default is written there, so what the other modules hold changes no result.
CONFIG_INPUTS = {"tasks/config/base.py", "tasks/config/rules.py"}

MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60

# The field has other words for these; see the glossary in CONTRIBUTING.md.
BANNED_WORDS = {"deed", "offspring", "lesson", "talk", "told", "said", "tell", "worth", "calm", "comfort", "whom"}


def name_of(module: Path) -> str:
    return module.relative_to(ROOT).with_suffix("").as_posix()


def parse(module: Path) -> ast.Module:
    return ast.parse(module.read_text(encoding="utf-8"))


def imports(module: Path) -> Iterator[str]:
    """Every dotted name that the module imports, wherever in it; `from a import b` gives `a.b`."""
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(module)}:{node.lineno}: write the import with its full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name: str) -> str | None:
    """The room of a dotted name; None for what is not ours."""
    parts = name.split(".")
    if parts[0] == "flows":
        return "flows"
    if parts[0] != "tasks" or len(parts) == 1:
        return None
    return parts[1] if parts[1] in ROOMS else "stages"


def part(stage: str, key: str) -> Any:
    """A part of the stage's entry in dvc.yaml."""
    entry = PIPELINE["stages"][stage]
    assert key in entry, f"add `{key}` to the stage `{stage}` in dvc.yaml"
    return entry[key]


def stage_function(stage: str) -> Any:
    assert stage in FILES, f"add tasks/{stage}.py, for dvc.yaml has a stage `{stage}`"
    function = getattr(importlib.import_module(f"tasks.{stage}"), stage, None)
    assert function, f"add a function `{stage}` to tasks/{stage}.py"
    return function


def modules_read(stage: str) -> set[str]:
    """The Python files among the deps of the stage, those in its folders included."""
    deps = [ROOT / dep for dep in part(stage, "deps") if dep.startswith("tasks/")]
    found = chain.from_iterable(dep.rglob("*.py") if dep.is_dir() else [dep] for dep in deps)
    return {path.relative_to(ROOT).as_posix() for path in found if path.suffix == ".py"}


# -- law 1: one name, every place ------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", sorted({*FILES, *STAGES}))
def test_a_stage_has_one_name_everywhere(stage: str) -> None:
    assert callable(stage_function(stage))
    assert stage in STAGES, f"add a stage `{stage}` to dvc.yaml, for there is tasks/{stage}.py"
    assert stage in Params.model_fields, f"add `{stage}` to Params in tasks/config/params.py, and to params.yaml"
    camel = stage.title().replace("_", "").removesuffix("Params")
    section = Params.model_fields[stage].annotation
    section = next(kind for kind in get_args(section) or [section] if kind is not NoneType)
    assert section.__name__.lower() == f"{camel}Params".lower(), f"the section {stage!r} has class {section.__name__}"
    cmd = part(stage, "cmd")
    assert cmd == f"python -m tasks.{stage}", "DVC hashes cmd: launchers and options never go into it"
    entry = PIPELINE["stages"][stage]
    written = [*part(stage, "outs"), *entry.get("metrics", []), *entry.get("plots", [])]
    assert all(isinstance(path, str) for path in written), "persist or cache: false would turn the run-cache off"
    assert all(path.startswith(f"artifacts/{stage}/") for path in written)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_by_its_own_name_when_called_alone(stage: str) -> None:
    last = ast.unparse(parse(ROOT / "tasks" / f"{stage}.py").body[-1])
    end = f"if __name__ == '__main__':\n    from tasks.runtime.stage_runner import run_stage\n    run_stage('{stage}')"
    assert last == end, "a stage must end by running itself, with the import inside: it is no input of the stage"


# -- law 2: imports point one way ------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_imports_point_to_lower_rooms(module: Path) -> None:
    own = name_of(module).replace("/", ".")
    here = room(own)
    for name in imports(module):
        there = room(name)
        if here is None or there is None:
            continue
        assert ROOMS.index(there) <= ROOMS.index(here), f"{own} imports {name}, but {there} stands above {here}"
        is_itself = name.startswith(own)
        assert not (here == there == "stages") or is_itself, f"{own} imports {name}: stages exchange files"


def test_every_folder_of_tasks_has_a_place_in_the_order() -> None:
    folders = {path.name for path in (ROOT / "tasks").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(ROOMS) - {"stages", "flows"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_change_of_how_stages_are_run_or_described_runs_none_again(stage: str) -> None:
    modules = modules_read(stage)
    assert not [module for module in modules if module.startswith("tasks/runtime/")]
    config = {module for module in modules if module.startswith("tasks/config/")}
    assert config <= CONFIG_INPUTS, "import config classes under `if TYPE_CHECKING:`"
    assert ("tasks/config/rules.py" in config) == ("tasks/rewards/composition.py" in modules)


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
    ours = ("tasks.rl", "tasks.core.errors", "tasks.core.text_stats")
    standard = ("__future__", "collections", "dataclasses", "itertools", "math", "statistics", "typing")
    allowed = ("torch", *ours, *standard)
    for used in imports(ROOT / "tasks" / "rl" / f"{name}.py"):
        assert any(f"{used}.".startswith(f"{known}.") for known in allowed), f"tasks/rl/{name}.py imports {used}"


# -- law 4: dvc.yaml is the one graph --------------------------------------------------------------------------


def test_dvc_yaml_lists_every_module_that_a_stage_imports() -> None:
    script = [sys.executable, "scripts/stage_deps.py"]
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
        "sub/c.py": "value = 1\n",
    }
    for name, text in files.items():
        (tmp_path / "tasks" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tasks" / name).write_text(text)
    spec = importlib.util.spec_from_file_location("stage_deps", ROOT / "scripts" / "stage_deps.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    expected = ["tasks/a.py", "tasks/b.py", "tasks/d.py", "tasks/sub/__init__.py", "tasks/sub/c.py"]
    assert module.closure(tmp_path / "tasks" / "a.py", tmp_path) == expected
    whole = [*expected[:-2], "tasks/sub"]
    assert module.collapse(expected, tmp_path) == whole, "unused.py is not read, so tasks/ stays apart"


@pytest.mark.parametrize("stage", STAGES)
def test_the_signature_names_the_sections_of_dvc_yaml(stage: str) -> None:
    *sections, artifacts = inspect.signature(stage_function(stage)).parameters
    assert artifacts == "artifacts"
    wanted, listed = {stage if name == "params" else name for name in sections}, set(part(stage, "params"))
    assert not wanted - listed, f"add {sorted(wanted - listed)} to params of the stage `{stage}` in dvc.yaml"
    assert not listed - wanted, f"remove {sorted(listed - wanted)} there, or let {stage}() take them"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_reads_the_folders_that_dvc_yaml_names(stage: str) -> None:
    """Whatever reads `artifacts.<stage>`, the stage's file or a library that it imports, counts."""
    modules = {f"tasks/{stage}.py", *modules_read(stage)}
    read = {name for module in modules for name in artifacts_read(ROOT / module)}
    listed = {dep.split("/")[1] for dep in part(stage, "deps") if dep.startswith("artifacts/")}
    assert not read - listed, f"add what it reads in artifacts/ of {sorted(read - listed)} to deps of `{stage}`"
    assert not listed - read, f"remove artifacts/ of {sorted(listed - read)} from deps of `{stage}`"


def artifacts_read(module: Path) -> set[str]:
    """Stages whose folders the module takes from an `Artifacts`."""
    nodes = [node for node in ast.walk(parse(module)) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if ast.unparse(node.value) == "artifacts"} - {"out"}


def test_what_a_stage_reads_another_stage_writes() -> None:
    written = [path for stage in STAGES for path in part(stage, "outs") + PIPELINE["stages"][stage].get("metrics", [])]
    for stage in STAGES:
        for dep in part(stage, "deps"):
            made = any(dep == path or dep.startswith(f"{path}/") for path in written)
            assert made == dep.startswith("artifacts/"), f"{stage} reads {dep}, which no stage writes"


@pytest.mark.parametrize(
    ("kind", "module", "section"),
    [
        ("readers", "tasks/data/sources.py", "collect"),
        ("rewards", "tasks/rewards/composition.py", "reward"),
        ("environments", "tasks/rl/multi_turn.py", "environment"),
        ("judges", "tasks/rewards/composition.py", "evaluate"),
    ],
)
def test_what_calls_users_code_reads_its_folder(kind: str, module: str, section: str) -> None:
    calls = {stage for stage in STAGES if module in modules_read(stage) and section in part(stage, "params")}
    knows = {stage for stage in STAGES if f"custom/{kind}" in part(stage, "deps")}
    assert calls == knows, "imported by name, so no walk over imports finds it: list it in dvc.yaml by hand"
    assert "__pycache__/" in (ROOT / ".dvcignore").read_text().split(), "else running a stage would change the folder"


@pytest.mark.parametrize("module", sorted(ROOT.glob("flows/**/*.py")), ids=name_of)
def test_no_flow_lists_the_stages_a_second_time(module: Path) -> None:
    values = [node.value for node in ast.walk(parse(module)) if isinstance(node, ast.Constant)]
    named = {value for value in values if isinstance(value, str) and value in STAGES}
    assert named <= {"evaluate"}, f"{name_of(module)} names {named}; dvc.yaml is where stages are listed"


def test_the_parameters_of_tests_are_the_shipped_ones() -> None:
    """At the commit that changed them last; no test reads those at the root, which are the user's."""
    copy = SHIPPED_PARAMS.relative_to(ROOT).as_posix()
    if not (commit := git("log", "-1", "--format=%H", "--", copy).strip()):
        pytest.skip("no history here")
    assert git("show", f"{commit}:{copy}") == git("show", f"{commit}:params.yaml"), f"cp params.yaml {copy}"
    tests = [path for path in ROOT.glob("tests/**/*.py") if path != Path(__file__)]
    assert [path for path in tests if 'ROOT / "params.yaml"' in path.read_text(encoding="utf-8")] == []


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout


# -- law 5: stages exchange files ------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_a_plain_function_of_parameters_and_paths(stage: str) -> None:
    signature = inspect.signature(stage_function(stage))
    assert signature.return_annotation == "None", "a stage returns nothing: it writes files"
    *sections, artifacts = signature.parameters.values()
    assert artifacts.annotation == "Artifacts"
    for item in sections:
        section = item.annotation.removesuffix(" | None")
        assert item.annotation == "int" or section.endswith("Params"), f"{stage}({item})"
        assert item.default is item.empty, f"{stage}({item}): a default would be a parameter that DVC cannot see"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_module_only_defines(stage: str) -> None:
    plain = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.If)
    for node in parse(ROOT / "tasks" / f"{stage}.py").body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert docstring or isinstance(node, plain), f"tasks/{stage}.py:{node.lineno} does something at import"


# -- law 6: a reader finds his way -----------------------------------------------------------------------------


def defined_names(module: Path) -> Iterator[tuple[str, int]]:
    """Every name that the module defines: of functions, classes, parameters, variables, fields and itself."""
    yield module.stem, 1
    for node in ast.walk(parse(module)):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, node.lineno
            case ast.arg(arg=name) | ast.alias(asname=str(name)):
                yield name, node.lineno
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name, node.lineno


def words_of(name: str) -> set[str]:
    """`CamelCase` and `snake_case` as lower-case words, a plural `s` removed."""
    return {word.lower().removesuffix("s") for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


@pytest.mark.parametrize("folder", ["flows", "tasks", "tests", "benchmarks", "scripts"])
def test_names_are_the_fields_words(folder: str) -> None:
    found = [
        f"{name_of(module)}.py:{line} {name}"
        for module in sorted((ROOT / folder).rglob("*.py"))
        for name, line in defined_names(module)
        if words_of(name) & BANNED_WORDS
    ]
    assert found == []


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_a_module_and_its_functions_can_be_held_in_mind(module: Path) -> None:
    assert len(module.read_text(encoding="utf-8").splitlines()) <= MAX_MODULE_LINES
    functions = [node for node in ast.walk(parse(module)) if isinstance(node, ast.FunctionDef)]
    long = [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES]
    assert long == [], f"more than {MAX_FUNCTION_LINES} lines"


@pytest.mark.parametrize("package", sorted({module.parent for module in MODULES}), ids=name_of)
def test_every_package_says_what_lives_there(package: Path) -> None:
    docstring = ast.get_docstring(parse(package / "__init__.py")) or ""
    is_a_room = package.parent in (ROOT, ROOT / "tasks")
    assert len(docstring.splitlines()) >= (3 if is_a_room else 1), "what is here, and what may be touched"
