"""Read rows from the Hugging Face hub, and procedural tasks from reasoning-gym."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import datasets
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from tasks.core.errors import DataError, SourceError

if TYPE_CHECKING:
    from tasks.config.data import SourceParams

__all__ = ["read_hub", "read_reasoning_gym"]

_DEFAULT_TASKS = 1000  # reasoning-gym generates any number


def read_hub(source: SourceParams, seed: int) -> tuple[Iterable[tuple[str, int, object]], dict[str, object]]:
    """A split of a hub dataset, at the commit that the revision means today; the card records it.

    Raises:
        SourceError: the hub cannot be reached, or has no such dataset, configuration, split or revision.
    """
    try:
        commit = str(HfApi().dataset_info(source.id, revision=source.revision).sha)
        rows: Any = datasets.load_dataset(
            source.id, source.subset, data_dir=source.data_dir, split=source.split, revision=commit
        )
    except (HfHubHTTPError, OfflineModeIsEnabled, DatasetNotFoundError, OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SourceError(
            f"source {source.name!r}: dataset {source.id!r} (subset {source.subset}, split {source.split}, revision "
            f"{source.revision}) could not be fetched from the Hugging Face hub: {first}; check the network, the names "
            "and your access, or use a source of kind local"
        ) from error
    origin: dict[str, object] = {
        "source": f"Hugging Face hub {source.id}", "subset": source.subset, "data_dir": source.data_dir,
        "split": source.split, "commit": commit,
    }  # fmt: skip
    return ((f"{source.id}/{source.split}", line, row) for line, row in enumerate(rows, start=1)), origin


def read_reasoning_gym(source: SourceParams, seed: int) -> tuple[Iterable[tuple[str, int, object]], dict[str, object]]:
    """Tasks made by reasoning-gym from the seed, `limit` of them: the question as prompt, the answer as response.

    Raises:
        SourceError: reasoning-gym is not installed.
        DataError: there is no such task, or it has no such option.
    """
    try:
        import reasoning_gym  # an extra of the project: only this source needs it
    except ImportError as error:
        raise SourceError(
            f"source {source.name!r}: kind reasoning_gym needs the package: `pip install reasoning-gym`"
        ) from error
    size = source.limit or _DEFAULT_TASKS
    try:
        tasks = reasoning_gym.create_dataset(source.id, size=size, seed=seed, **source.options)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise DataError(
            f"source {source.name!r}: reasoning-gym makes no task {source.id!r} with options {source.options} ({error})"
        ) from error
    origin: dict[str, object] = {
        "source": f"reasoning-gym {importlib.metadata.version('reasoning-gym')}", "task": source.id,
        "options": source.options, "seed": seed,
    }  # fmt: skip
    return _gym_rows(tasks, source), origin


def _gym_rows(tasks: Any, source: SourceParams) -> Iterator[tuple[str, int, object]]:
    for line, task in enumerate(tasks, start=1):
        row = {"prompt": task["question"], "answer": str(task["answer"]), "response": str(task["answer"])}
        yield f"reasoning_gym/{source.id}", line, row
