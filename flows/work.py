"""Bringing one stage up to date, without Prefect: what a task does in its own process, or a child of it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flows.ranks import execute_in_ranks
from tasks.runtime import dvc_reproduce, versioning
from tasks.runtime.stage_runner import execute_stage, read_metrics

__all__ = ["Outcome", "bring_up_to_date"]


@dataclass(frozen=True)
class Outcome:
    """What became of a stage. `key` is DVC's hash of all that it read."""

    stage: str
    result: dvc_reproduce.Result
    key: str
    reasons: tuple[str, ...]
    seconds: float
    metrics: dict[str, float]

    @property
    def why(self) -> str:
        """The reasons in one line."""
        return "; ".join(self.reasons) or "nothing that it reads has changed"


def bring_up_to_date(
    name: str,
    *,
    force: bool,
    pull: bool,
    on_begin: Callable[[Sequence[str]], None],
    on_wait: Callable[[str], None],
    ranks: int = 1,
) -> Outcome:
    """Run the stage if DVC finds that it must.

    Args:
        name: the stage in dvc.yaml.
        force: run it even if nothing changed.
        pull: fetch missing results from the DVC remote before running.
        on_begin: told why, when the stage starts to compute.
        on_wait: told what it waits for, where another process works on the same files.
        ranks: how many processes share the work, if the stage's work can be shared.

    Raises:
        RLHFError: whatever the stage or DVC finds wrong; dvc.lock is left alone.
    """
    started = time.monotonic()
    reasons = tuple(versioning.status(name) or (["forced"] if force else []))

    def job() -> None:
        on_begin(reasons)
        if ranks > 1 and versioning.takes_ranks(name):
            execute_in_ranks(name, reasons, ranks)
        else:
            execute_stage(name, reasons)

    result = dvc_reproduce.reproduce(name, job, force=force, pull=pull, on_wait=on_wait)
    key = versioning.stage_key(name) or ""
    return Outcome(name, result, key, reasons, time.monotonic() - started, read_metrics(name))
