"""Puts the files that `rlhf new` copies into the wheel, as flows/template/; all else is in pyproject.toml."""

import ast
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


def template_files() -> list[Path]:
    """The files of `COPIED` in flows/new.py, and those of its `STARTS`."""
    nodes = ast.parse(Path("flows/new.py").read_text(encoding="utf-8")).body
    values = {ast.unparse(node.targets[0]): node.value for node in nodes if isinstance(node, ast.Assign)}
    paths = [Path(name) for name in (*ast.literal_eval(values["COPIED"]), ast.literal_eval(values["STARTS"]))]
    found = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return [file for file in found if file.is_file() and "__pycache__" not in file.parts]


class BuildWithTemplate(build_py):
    """Builds the packages, and the template beside them."""

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *map(str, template_files())]

    def run(self) -> None:
        super().run()
        for file in [] if self.editable_mode else template_files():
            target = Path(self.build_lib) / "flows" / "template" / file
            self.mkpath(str(target.parent))
            self.copy_file(str(file), str(target))


setup(cmdclass={"build_py": BuildWithTemplate})
