"""A project of one's own, outside of a clone: its files, and how it shows DVC the installed code."""

import os
import shutil
import subprocess
from importlib.metadata import distributions
from pathlib import Path

from flows.worktrees import as_project_root
from tasks.config.params import load_preset, write_overrides
from tasks.core.errors import ConfigError

__all__ = ["INSTALLED", "link_code", "new_project"]

INSTALLED = Path(__file__).resolve().parents[1]
"""The folder of `flows` and `tasks`: a clone, or an environment's site-packages."""

CODE = ("flows", "tasks")
STARTS = "infra/new"
COPIED = (
    ".dvc/.gitignore", ".dvc/config", ".dvcignore", ".gitignore", "custom", "data/README.md", "dvc.yaml",
    "infra/constitutions", "infra/lm_eval", "infra/presets", "params.yaml", "prefect.yaml",
)  # fmt: skip
"""What a project starts with; setup.py puts it into the wheel."""


def new_project(folder: Path, start: str) -> None:
    """Make a project in a new folder, with git and DVC initialised, that starts from that kind of data.

    Raises:
        ConfigError: the folder holds something, or git is missing.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty: name a new folder")
    if not shutil.which("git"):
        raise ConfigError("`git` is missing, which DVC needs: install git")
    source = next(path for path in (INSTALLED / "flows" / "template", INSTALLED) if (path / "dvc.yaml").is_file())
    for name in COPIED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source / name, folder / name)
    shutil.copyfile(source / STARTS / "README.md", folder / "README.md")
    with (folder / ".gitignore").open("a", encoding="utf-8") as file:
        file.writelines(f"/{name}\n" for name in CODE)
    versions = sorted({f"{found.metadata['Name']}=={found.version}\n" for found in distributions()}, key=str.lower)
    (folder / "requirements.lock").write_text("".join(versions), encoding="utf-8")
    for rows in (source / STARTS).glob(f"{start}.jsonl"):
        shutil.copy(rows, folder / "data")
    link_code(folder)
    with as_project_root(folder.resolve()):  # where names of custom/ are looked up
        overlays = [load_preset(source, start, Path(STARTS))] if start != "film" else []
        write_overrides(Path("params.yaml"), overlays)
    for words in (["init", "--quiet"], ["add", "--all"]):
        subprocess.run(["git", *words], cwd=folder, check=True)


def link_code(root: Path) -> None:
    """In a project without code of its own, link `flows` and `tasks` to the installed ones, which DVC then hashes.

    So dvc.yaml is that of a clone, and an upgrade runs the stages whose code it changes. Git ignores the links.
    """
    for name in CODE:
        link, target = root / name, INSTALLED / name
        ours = link.is_symlink() or (not link.exists() and (root / "custom").is_dir())
        if ours and link.resolve() != target:
            draft = root / f".{name}.{os.getpid()}"
            draft.symlink_to(target)
            draft.replace(link)  # at once, whatever other commands do
