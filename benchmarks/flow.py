"""Overhead of the flow over the bare stages: `make bench-flow`.

In a clone, on the preset `tiny`, whose stages take a moment: the bare stage functions one after another in one
process; `dvc repro`; `rlhf run` from scratch; and `rlhf run` again with nothing to do, with and without standing
services. Wall seconds, the median of the repetitions. Prints a line per way and, last, one JSON line.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from inputs import ROOT, repetitions

BARE_STAGES = """
import importlib, os
from tasks.runtime import dvc_stages
from tasks.config.params import load_params
from tasks.core.paths import Artifacts, project_root, stage_dir
from tasks.runtime.stage_runner import stage_arguments, write_empty_outputs
params = load_params(project_root() / "params.yaml")
for name, upstream in dvc_stages.graph().items():
    if getattr(params, name) is None:
        write_empty_outputs(name)
        continue
    function = getattr(importlib.import_module(f"tasks.{name}"), name)
    artifacts = Artifacts(out=stage_dir(name), **{stage: stage_dir(stage) for stage in upstream})
    artifacts.out.mkdir(parents=True, exist_ok=True)
    function(*stage_arguments(function, name, params), artifacts)
"""


def run_seconds(project: Path, *args: str) -> float:
    prefixes = ("PREFECT", "MLFLOW", "RLHF", "PYTHONPATH")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(prefixes)}
    started = time.perf_counter()
    completed = subprocess.run(
        [sys.executable, *args], cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    if completed.returncode:
        sys.exit(f"{args}: {completed.stdout}{completed.stderr}")
    return time.perf_counter() - started


def clear_outputs(project: Path) -> None:
    """Delete everything that was computed in the project."""
    for name in ("artifacts", ".dvc/cache", ".dvc/tmp"):
        shutil.rmtree(project / name, ignore_errors=True)
    (project / "dvc.lock").unlink(missing_ok=True)


def time_all(project: Path) -> dict[str, float]:
    rlhf = ("-m", "flows.cli.main")
    timings = {}
    scratch = {"bare stages": ("-c", BARE_STAGES), "dvc repro": ("-m", "dvc", "repro"), "run": (*rlhf, "run")}
    for name, args in scratch.items():
        clear_outputs(project)
        timings[name] = run_seconds(project, *args)
    timings["cached run"] = run_seconds(project, *rlhf, "run")
    run_seconds(project, *rlhf, "up", "--prefect-port", "4299", "--mlflow-port", "5099")
    try:
        timings["cached run, services up"] = run_seconds(project, *rlhf, "run")
    finally:
        run_seconds(project, *rlhf, "down")
    return timings


def main() -> None:
    count = repetitions(__doc__)
    with tempfile.TemporaryDirectory(prefix="rlhf-bench-flow-") as folder:
        project = Path(folder) / "project"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(project)], check=True)
        run_seconds(project, "-m", "flows.cli.main", "run", "base_model", "--preset", "tiny")  # writes the preset
        rounds = [time_all(project) for _ in range(count)]
    medians = {name: round(statistics.median(timings[name] for timings in rounds), 1) for name in rounds[0]}
    for name, median in medians.items():
        print(f"{name:<25} {median:6.1f} s")
    medians["overhead"] = round(medians["run"] - medians["bare stages"], 1)
    print(json.dumps({name.replace(", ", "_").replace(" ", "_"): value for name, value in medians.items()}))


if __name__ == "__main__":
    main()
