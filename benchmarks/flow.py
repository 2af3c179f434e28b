"""What the flow costs on top of the stages: `make bench-flow`.

In a clone, on the preset `tiny`, whose stages compute for a moment: the bare stage functions one after another in one
process; `dvc repro`; `rlhf run` from scratch; and `rlhf run` again with nothing to do, with and without standing
services. Wall seconds, the median of the repetitions. Prints a line per way and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

BARE = """
import importlib, os
from tasks.runtime import dvc_stages
from tasks.core.params import load_params
from tasks.core.paths import artifacts, project_root
from tasks.runtime.stage_runner import stage_arguments, write_empty_outputs
params = load_params(project_root() / "params.yaml")
for name in dvc_stages.graph():
    if getattr(params, name) is None:
        write_empty_outputs(name)
        continue
    function = getattr(importlib.import_module(f"tasks.{name}"), name)
    positional, folders = stage_arguments(function, name, params)
    artifacts(name).mkdir(parents=True, exist_ok=True)
    function(*positional, **folders)
"""


def seconds(project: Path, *words: str) -> float:
    ours = ("PREFECT", "MLFLOW", "RLHF", "PYTHONPATH")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words], cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{words}: {done.stdout}{done.stderr}")
    return time.perf_counter() - begun


def forget(project: Path) -> None:
    """Everything that was computed here."""
    for name in ("artifacts", ".dvc/cache", ".dvc/tmp"):
        shutil.rmtree(project / name, ignore_errors=True)
    (project / "dvc.lock").unlink(missing_ok=True)


def measure(project: Path) -> dict[str, float]:
    rlhf = ("-m", "flows.cli")
    found = {}
    scratch = {"bare stages": ("-c", BARE), "dvc repro": ("-m", "dvc", "repro"), "run": (*rlhf, "run")}
    for name, words in scratch.items():
        forget(project)
        found[name] = seconds(project, *words)
    found["cached run"] = seconds(project, *rlhf, "run")
    seconds(project, *rlhf, "up", "--prefect-port", "4299", "--mlflow-port", "5099")
    try:
        found["cached run, services up"] = seconds(project, *rlhf, "run")
    finally:
        seconds(project, *rlhf, "down")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    repetitions = parser.parse_args().repetitions
    with tempfile.TemporaryDirectory(prefix="rlhf-bench-flow-") as folder:
        project = Path(folder) / "project"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(project)], check=True)
        seconds(project, "-m", "flows.cli", "run", "base_model", "--preset", "tiny")  # writes the preset
        rounds = [measure(project) for _ in range(repetitions)]
    medians = {name: round(statistics.median(found[name] for found in rounds), 1) for name in rounds[0]}
    for name, median in medians.items():
        print(f"{name:<25} {median:6.1f} s")
    medians["overhead"] = round(medians["run"] - medians["bare stages"], 1)
    print(json.dumps({name.replace(", ", "_").replace(" ", "_"): value for name, value in medians.items()}))


if __name__ == "__main__":
    main()
