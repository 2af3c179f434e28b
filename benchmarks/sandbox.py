"""Cost of running a program's tests in the sandbox: `make bench-sandbox`.

One small program with three asserts, many times, each a little different so that none is skipped: behind all walls;
with nothing but limits; and, for comparison, as people would run it without any of this, program and tests in one plain
`python -c`. Equally many at once each way. Prints a line per way and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tasks.config.rules import CodeRule
from tasks.rewards.sandbox.sandbox import Job, Sandbox

PROGRAM = "def median(items):\n    items = sorted(items)\n    return items[len(items) // 2]  # {number}\n"
TESTS = "assert median([3, 1, 2]) == 2\nassert median(list(range(99))) == 49\nassert median('abc') == 'b'\n"


def sandbox_runner(options: CodeRule) -> Callable[[list[str]], None]:
    sandbox = Sandbox(options)

    def run(programs: list[str]) -> None:
        results = sandbox.run([Job(program, TESTS, "median") for program in programs])
        if any(result.status != "passed" for result in results):
            sys.exit(f"a right program did not pass: {results}")

    return run


def plain_runner(workers: int) -> Callable[[list[str]], None]:
    def run_one(program: str) -> None:
        subprocess.run([sys.executable, "-I", "-S", "-c", program + TESTS], check=True, stdin=subprocess.DEVNULL)

    def run(programs: list[str]) -> None:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(run_one, programs))

    return run


def milliseconds_per_program(run: Callable[[list[str]], None], programs: int, repetition: int) -> float:
    """Measure the wall time per program in milliseconds."""
    texts = [PROGRAM.format(number=f"{repetition}.{number}") for number in range(programs)]
    started = time.perf_counter()
    run(texts)
    return (time.perf_counter() - started) * 1000 / programs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=100)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    options = CodeRule(workers=args.workers, wall_seconds=60)
    modes = {
        "bubblewrap": sandbox_runner(options),
        "limits": sandbox_runner(options.model_copy(update={"isolation": "unsafe_no_isolation"})),
        "plain": plain_runner(args.workers),
    }
    times: dict[str, list[float]] = {name: [] for name in modes}
    for repetition in range(args.repetitions):
        for name, run in modes.items():
            times[name].append(milliseconds_per_program(run, args.programs, repetition))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for name, median in medians.items():
        print(f"{name:<11} {1000 / median:6.1f} programs/s, {median:6.1f} ms a program")
    overhead = round(medians["bubblewrap"] - medians["plain"], 1)
    print(
        json.dumps({"workers": args.workers, "overhead_ms": overhead, **{k: round(v, 1) for k, v in medians.items()}})
    )


if __name__ == "__main__":
    main()
