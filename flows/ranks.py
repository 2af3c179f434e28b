"""A stage in several processes, ranks, that share its work: torch's elastic launcher around `execute_stage`.

This is what `torchrun --standalone --nproc-per-node N -m tasks.<stage>` does, with two things added: the ranks end with
the process that started them, and an error is the one message that it is without ranks.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flows import offspring
from tasks.core.errors import RLHFError, StageError
from tasks.runtime.stage_runner import execute_stage

__all__ = ["execute_in_ranks"]


def execute_in_ranks(name: str, why: Sequence[str], count: int) -> None:
    """`execute_stage` by so many processes on this machine.

    Raises:
        RLHFError: what the stage raised, or a StageError where a rank ended without saying why.
    """
    with tempfile.TemporaryDirectory(prefix="rlhf-ranks-") as folder:
        said = Path(folder)
        reasons = [f"--why={reason}" for reason in why]
        launcher = offspring.start(["-m", "flows.ranks", name, f"--said={folder}", f"--count={count}", *reasons])
        try:
            status = launcher.wait()
        finally:
            offspring.stop(launcher)
        if status:
            raise _error(name, said, status)


def _error(name: str, folder: Path, status: int) -> RLHFError:
    """What the first rank to fail has raised; the others may only have missed it."""
    said = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    if not said:
        return StageError(f"{name}: its ranks ended with status {status}; what they printed is above")
    content = json.loads(said[0].read_text(encoding="utf-8"))
    return offspring.error_from(content, f"{name}, rank {said[0].stem}: {{}}")


def _launch(name: str, count: int, folder: Path) -> None:
    """Start the ranks, each this very command; returns when all have ended, and exits with 1 where one failed."""
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the error is told by the parent
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        run_id=name,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs"), local_ranks_filter={0}),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "flows.ranks", *sys.argv[1:])
    except ChildFailedError:
        sys.exit(1)


def _work(name: str, why: Sequence[str], folder: Path) -> None:
    offspring.follow_parent()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how the launcher ends the ranks that are left
    try:
        execute_stage(name, why)
    except Exception as error:
        told = folder / f"{os.environ['RANK']}.json"
        told.write_text(json.dumps(offspring.plain_error(error)), encoding="utf-8")
        if not isinstance(error, RLHFError):
            raise
        sys.exit(1)


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--said", type=Path, required=True)
    parser.add_argument("--why", action="append", default=[])
    given = parser.parse_args()
    if "RANK" in os.environ:
        _work(given.name, given.why, given.said)
    else:
        _launch(given.name, given.count, given.said)


if __name__ == "__main__":
    _main()
