"""A project of one's own, outside of a clone: its files, and how it shows DVC the installed code."""

import shutil
from importlib.metadata import distributions
from pathlib import Path

from flows.installed import CODE, INSTALLED, link_code
from flows.worktrees import as_project_root, git
from tasks.config.params import load_preset, write_overrides
from tasks.core.errors import ConfigError

__all__ = ["new_project"]

PACKAGE = "rlhf-pipeline"  # its code is linked, and so no part of the lock

STARTS = "infra/new"
COPIED = (
    ".dvc/.gitignore", ".dvc/config", ".dvcignore", ".gitignore", "custom", "data/README.md", "dvc.yaml",
    "infra/constitutions", "infra/lm_eval", "infra/presets", "params.yaml", "prefect.yaml",
)  # fmt: skip
"""What a project starts with; setup.py puts it into the wheel."""


def new_project(folder: Path, start: str) -> None:
    """Make a project in a new folder, with git and DVC initialised, that starts from that kind of data.

    In a clone it starts from the files as they are there, changes of params.yaml included.

    Raises:
        ConfigError: the folder holds something, or git is missing.
        StageError: git refuses; like after every error, nothing is left.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty: name a new folder")
    if not shutil.which("git"):
        raise ConfigError("`git` is missing, which DVC needs: install git")
    source = next(path for path in (INSTALLED / "flows" / "template", INSTALLED) if (path / "dvc.yaml").is_file())
    try:
        _copy_files(source, folder, start)
        link_code(folder)
        with as_project_root(folder.resolve()):  # where names of custom/ are looked up
            overlays = [load_preset(source, start, Path(STARTS))] if start != "film" else []
            write_overrides(Path("params.yaml"), overlays)
            for words in (("init", "--quiet"), ("add", "--all")):
                git(*words)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _copy_files(source: Path, folder: Path, start: str) -> None:
    for name in COPIED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source / name, folder / name)
    shutil.copyfile(source / STARTS / "README.md", folder / "README.md")
    with (folder / ".gitignore").open("a", encoding="utf-8") as file:
        file.writelines(f"/{name}\n" for name in CODE)
    versions = {f"{found.metadata['Name']}=={found.version}\n" for found in distributions() if found.name != PACKAGE}
    (folder / "requirements.lock").write_text("".join(sorted(versions, key=str.lower)), encoding="utf-8")
    for rows in (source / STARTS).glob(f"{start}.jsonl"):
        shutil.copy(rows, folder / "data")
