"""`kill -9` at any moment, again and again: the run that goes on is bit for bit the run that was never interrupted."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
KILLS = 3


def run(algorithm: str, folder: Path, *moment: int) -> int:
    command = [sys.executable, "-m", "tests.support.killed_run", algorithm, str(folder), *map(str, moment)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_killed_three_times_and_still_the_same_run(algorithm: str, tmp_path: Path) -> None:
    """An update has 8 moments and a ninth in its checkpoint; from the 7th on, a run passes at least one checkpoint."""
    draw = random.Random(0)
    for moment in [draw.randint(4, 11) for _ in range(KILLS)]:
        assert run(algorithm, tmp_path, moment) == -signal.SIGKILL, f"it has done too much before moment {moment}"
    assert run(algorithm, tmp_path) == 0
    whole = tmp_path / "whole"
    assert run(algorithm, whole) == 0
    result, expected = (torch.load(folder / "result.pt") for folder in (tmp_path, whole))
    assert len(expected["history"]) == 6
    assert result["history"] == expected["history"]
    assert result["samples"] == expected["samples"]
    assert result["rollouts"] == expected["rollouts"]
    for name, value in expected["weights"].items():
        assert torch.equal(result["weights"][name], value), name
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2, "they must not pile up"
