"""Several values of some parameters: each variant in a git worktree of its own, all of them with one DVC cache.

What variants have in common is computed by the first and restored for the others. All report to the project's MLflow,
tagged with the sweep and their values; what they wrote is in the cache, so `rlhf run -S` with the same values brings it
into the project itself.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows import screen
from flows.worktrees import git, run, worktree
from tasks.core import recording, versioning
from tasks.core.errors import ConfigError, StageError
from tasks.core.params import load_params, parse_override
from tasks.core.paths import project_root, state
from tasks.evals.variants import write

__all__ = ["sweep", "variants_of"]


def sweep(settings: Sequence[str], words: Sequence[str]) -> Path:
    """Run every combination, one after another, and compare them; the folder with the comparison.

    Args:
        settings: `key=value,value,…` each.
        words: what to pass to each `rlhf run`.

    Raises:
        ConfigError: a setting is malformed, or a combination is not valid.
        StageError: there is no git commit to start from, or a variant failed; those before it are kept.
    """
    variants = variants_of(settings)
    name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    folder = state() / "sweeps" / name
    folder.mkdir(parents=True)
    found: dict[str, Any] = {}
    for number, variant in enumerate(variants, start=1):
        screen.variant_begins(number, len(variants), variant)
        with _worktree(folder / "worktree") as tree:
            _run(tree, name, variant, words)
            evaluated = tree / "artifacts" / "evaluate" / "policies.json"
            if evaluated.is_file():
                found[" ".join(variant)] = json.loads(evaluated.read_text(encoding="utf-8"))
                write(folder, found)
    return folder


def variants_of(settings: Sequence[str]) -> list[tuple[str, ...]]:
    """Every combination of the values, each as `key=value` words.

    A list or mapping counts as one value: commas within brackets do not separate.

    Raises:
        ConfigError: a setting has no key or no value.
    """
    choices = []
    for setting in settings:
        key, sign, values = setting.partition("=")
        words = [f"{key}{sign}{value}" for value in _separated(values)]
        for word in words:
            parse_override(word)
        choices.append(words)
    if not choices:
        raise ConfigError("a sweep needs values to try: rlhf sweep -S ppo.kl_coef=0.02,0.05,0.1")
    return list(itertools.product(*choices))


def _separated(values: str) -> list[str]:
    parts, depth = [""], 0
    for sign in values:
        depth += (sign in "[{") - (sign in "]}")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def _run(tree: Path, name: str, variant: Sequence[str], words: Sequence[str]) -> None:
    settings = [word for setting in variant for word in ("-S", setting)]
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": recording.store_uri(),
        recording.SWEEP_VARIABLE: json.dumps({"sweep": name, "variant": " ".join(variant)}),
    }
    failed = f"the variant {' '.join(variant)} failed, see above; run the sweep again to go on from there"
    run(tree, [*words, *settings], environment, failed)


@contextmanager
def _worktree(folder: Path) -> Iterator[Path]:
    """The project as it is now, changes that are not committed included, at another place with the same DVC cache."""
    root = project_root()
    if not recording.git_commit():
        raise StageError("a sweep needs a git commit to start from: commit the project first")
    with worktree(folder, "HEAD"):
        changed = git("ls-files", "--modified", "--others", "--exclude-standard", "-z").split("\0")
        for name in filter(None, changed):
            target = folder / name
            if (root / name).exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, target)
            else:
                target.unlink(missing_ok=True)
        versioning.share_cache(folder)
        load_params(folder / "params.yaml")
        yield folder
