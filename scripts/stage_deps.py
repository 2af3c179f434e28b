"""Keeps the Python files in dvc.yaml: each stage depends on every module of ours that it imports, near or far.

    python scripts/stage_deps.py            say where dvc.yaml differs, exit 1 if it does
    python scripts/stage_deps.py --write    rewrite the lines of code in each stage's deps; all other lines stay

Imports under `if TYPE_CHECKING` and `if __name__ == "__main__"` do not count: nothing that they name takes part in the
stage's work. A package's `__init__.py` counts once it holds more than its docstring. A folder stands for its files
where the stage reads them all.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "tasks"
BY_HAND = ("tasks/evals/report.html.j2",)  # found by name, so no import leads to them


def closure(file: Path, root: Path = ROOT) -> list[str]:
    """The file and every file of the package that it imports, directly or not, as sorted paths relative to the root."""
    found: set[Path] = set()
    waiting = [file]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += imported(current, root)
    return sorted(path.relative_to(root).as_posix() for path in found)


def imported(file: Path, root: Path = ROOT) -> set[Path]:
    """The files of the package that importing this file and calling its functions may import."""
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    names = {name for node in _running_code(tree) for name in _names(node, file)}
    return {path for name in names if name.split(".")[0] == PACKAGE for path in _files(name, root)}


def _running_code(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and _never_runs(child.test):
            for statement in child.orelse:
                yield statement
                yield from _running_code(statement)
        else:
            yield child
            yield from _running_code(child)


def _never_runs(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING", "__name__ == '__main__'")


def _names(node: ast.AST, file: Path) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        if node.level:
            raise SystemExit(f"{file}:{node.lineno}: write the import with its full name")
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _files(name: str, root: Path) -> Iterator[Path]:
    """The module of that dotted name, or the one it is a member of, and the packages around it that hold code."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        path = root.joinpath(*parts[:length])
        if path.with_suffix(".py").is_file():
            yield path.with_suffix(".py")
        elif (path / "__init__.py").is_file() and _holds_code(path / "__init__.py"):
            yield path / "__init__.py"


def collapse(files: list[str], root: Path = ROOT) -> list[str]:
    """The same files, with the outermost folder in place of those of a package that are all there."""
    left = set(files)
    for folder in sorted((root / PACKAGE).rglob("*/")):
        name = folder.relative_to(root).as_posix()
        code = {path.relative_to(root).as_posix() for path in folder.rglob("*.py") if _holds_code(path)}
        if code and code <= left:
            left = {file for file in left if not file.startswith(f"{name}/")} | {name}
    return sorted(left)


def _holds_code(file: Path) -> bool:
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in body)


def main(write: bool) -> int:
    """Compare or rewrite; returns the exit status."""
    yaml = YAML()
    yaml.width = 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    path = ROOT / "dvc.yaml"
    document = yaml.load(path.read_text(encoding="utf-8"))
    differences = 0
    for name, stage in document["stages"].items():
        if not (file := ROOT / PACKAGE / f"{name}.py").is_file():
            raise SystemExit(f"add tasks/{name}.py: dvc.yaml has a stage `{name}`")
        wanted = collapse(closure(file))
        written = [dep for dep in stage.setdefault("deps", []) if dep.startswith(f"{PACKAGE}/") and dep not in BY_HAND]
        if written == wanted:
            continue
        differences += 1
        for word, lines in (("add", set(wanted) - set(written)), ("remove", set(written) - set(wanted))):
            print("".join(f"{name}: {word} {line}\n" for line in sorted(lines)), end="")
        stage["deps"] = wanted + [dep for dep in stage["deps"] if dep not in written]
    if differences and write:
        with path.open("w", encoding="utf-8") as file:
            yaml.dump(document, file)
        return 0
    if differences:
        print("The deps in dvc.yaml differ from the imports: run `python scripts/stage_deps.py --write`")
    return min(differences, 1)


if __name__ == "__main__":
    sys.exit(main("--write" in sys.argv[1:]))
