"""The installed code, and how a project without a copy of it shows it to DVC."""

import os
from pathlib import Path

__all__ = ["CODE", "INSTALLED", "link_code"]

INSTALLED = Path(__file__).resolve().parents[1]
"""The folder of `flows` and `tasks`: a clone, or an environment's site-packages."""

CODE = ("flows", "tasks")


def link_code(root: Path) -> None:
    """In a project without code of its own, link `flows` and `tasks` to the installed ones, which DVC then hashes.

    So dvc.yaml is that of a clone, and an upgrade runs the stages whose code it changes. Git ignores the links.
    """
    links = [root / name for name in CODE]
    if not (root / "custom").is_dir() or any(link.exists() and not link.is_symlink() for link in links):
        return
    for link in links:
        target = INSTALLED / link.name
        if link.resolve() != target:
            draft = root / f".{link.name}.{os.getpid()}"
            draft.symlink_to(target)
            draft.replace(link)  # at once, whatever other commands do
