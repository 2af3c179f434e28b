"""The accelerators of this machine, found without importing torch, which takes seconds."""

from __future__ import annotations

import os
import shutil
import subprocess

__all__ = ["gpus"]


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; empty without one."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [device.strip() for device in given.split(",") if device.strip()]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return [str(number) for number in range(len(listed.stdout.splitlines()))]
