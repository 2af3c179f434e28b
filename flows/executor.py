"""Execution of one stage: DVC decides in this process; the stage runs here, in a child process, or in several ranks.

The ranks are those of torch's elastic launcher, as in `torchrun --standalone --nproc-per-node N -m tasks.<stage>`, but
they end with the process that started them, and an error is one message, as without ranks.
"""

import argparse
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from flows import processes
from tasks.core.paths import state_dir
from tasks.core.terminal import allow_all_characters
from tasks.runtime import dvc_stages
from tasks.runtime.stage_runner import Outcome, execute_stage, is_off, read_history, read_metrics

__all__ = ["Execution", "ensure_stage", "stage_log_path", "visible_gpus"]

# DVC's locks are per process: in one process only one thread at a time may be in DVC's code.
_dvc_lock = threading.Lock()


@dataclass(frozen=True)
class Execution:
    """Settings for the execution of a stage.

    Args:
        own_process: in a child process, beside which others can run and which can be ended.
        ranks: how many processes share the work, if it can be shared.
        device: the GPU that the child sees; None for all that this process sees.
        timeout: seconds after which the child is ended.
    """

    own_process: bool = False
    ranks: int = 1
    device: str | None = None
    timeout: float | None = None


def ensure_stage(
    name: str,
    execution: Execution,
    *,
    force: bool,
    pull: bool,
    on_start: Callable[[Sequence[str], bool], None],
    on_wait: Callable[[str], None],
) -> Outcome:
    """Run the stage if DVC finds that it must; where one of them fails, an RLHFError, and dvc.lock is left alone.

    Args:
        force: run it even if nothing changed.
        pull: fetch missing results from the DVC remote before running.
        on_start: called with the reasons and whether the stage needs a device, before the stage computes.
        on_wait: called with the blocking process, where another one works on the same files.
    """
    started = time.monotonic()

    off = is_off(name)

    def work() -> None:
        if off:
            execute_stage(name, reasons)  # which writes empty outputs, at once
            return
        meta = dvc_stages.meta(name)
        with _released(_dvc_lock):
            on_start(reasons, meta.get("device", False))
            _execute(name, reasons, execution, execution.ranks if meta.get("ranks") else 1)

    with _child_lock(name):
        pass  # a child of a killed run needs a moment to end, and may still write
    with _dvc_lock:
        reasons = tuple(dvc_stages.status(name) or (["forced"] if force else []))
        result = dvc_stages.reproduce(name, work, force=force, pull=pull, on_wait=on_wait)
        key = dvc_stages.stage_key(name) or ""
    seconds = time.monotonic() - started
    return Outcome(name, "off" if off else result, key, reasons, seconds, read_metrics(name), read_history(name))


def stage_log_path(name: str) -> Path:
    """The file for what the stage prints in a process of its own."""
    return state_dir() / "logs" / f"{name}.log"


def visible_gpus() -> list[str]:
    """List the GPUs of this process in the spelling of CUDA_VISIBLE_DEVICES, without torch, whose import is slow."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [device.strip() for device in visible.split(",") if device.strip()]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    gpus = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]  # their MIG parts are indented
    return [str(number) for number in range(len(gpus))]


@contextmanager
def _released(lock: threading.Lock) -> Iterator[None]:
    lock.release()
    try:
        yield
    finally:
        lock.acquire()


def _execute(name: str, reasons: Sequence[str], execution: Execution, ranks: int) -> None:
    if not execution.own_process and ranks == 1:
        execute_stage(name, reasons)
        return
    args = ["-m", "flows.executor", name, f"--ranks={ranks}", *(f"--reason={reason}" for reason in reasons)]
    device = {} if execution.device is None else {"CUDA_VISIBLE_DEVICES": execution.device}
    log = stage_log_path(name) if execution.own_process else None
    processes.run_python(args, name, environment=os.environ | device, log=log, timeout=execution.timeout)


def _child_lock(name: str) -> FileLock:
    """The lock that a child holds as long as it works on the stage."""
    stage_log_path(name).parent.mkdir(parents=True, exist_ok=True)
    return FileLock(stage_log_path(name).with_suffix(".lock"))


def _launch_ranks(name: str, count: int) -> None:
    """Start the ranks, each this very command; returns when all have ended, and exits with 1 where one failed."""
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the parent prints the error
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    logs = Path(os.environ[processes.ERROR_VARIABLE]).parent
    specs = DefaultLogsSpecs(log_dir=str(logs), local_ranks_filter={0})
    config = LaunchConfig(  # one node
        1, 1, count, run_id=name, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, logs_specs=specs
    )
    try:
        elastic_launch(config, sys.executable)("-m", "flows.executor", *sys.argv[1:])
    except ChildFailedError:
        sys.exit(1)


def _main() -> None:
    allow_all_characters()
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--reason", action="append", default=[])
    args = parser.parse_args()
    is_rank = "RANK" in os.environ
    if is_rank or args.ranks == 1:
        processes.die_with_parent()  # the launcher ends with its ranks
    with processes.report_errors():
        if is_rank:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # how the launcher ends the ranks that are left
            execute_stage(args.name, args.reason)
            return
        with _child_lock(args.name):
            if args.ranks > 1:
                _launch_ranks(args.name, args.ranks)
            else:
                execute_stage(args.name, args.reason)


if __name__ == "__main__":
    _main()
