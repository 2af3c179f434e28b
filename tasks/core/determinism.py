"""Results that do not depend on the kind of CPU, nor on the number of threads, and a record of both.

docs/reproducibility.md says what is equal under what. The default, `native`, leaves the choice of instructions to the
libraries, which take the newest that the CPU knows. `RLHF_DETERMINISM=portable` fixes it.
"""

import hashlib
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

from tasks.core.errors import ConfigError
from tasks.core.paths import project_root

__all__ = ["DETERMINISM_VAR", "describe_machine", "determinism", "fix_instructions"]

DETERMINISM_VAR = "RLHF_DETERMINISM"
CPU_INFO = Path("/proc/cpuinfo")

# Each library reads its variable once, before it computes. MKL's STRICT makes products independent of the number of
# threads. The third one is for NumPy and SciPy.
AVX2_VARIABLES = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "AVX2,STRICT",
    "OPENBLAS_CORETYPE": "Haswell",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}


def fix_instructions() -> None:
    """Let the numerical libraries of this process and its children use AVX2, if determinism is portable."""
    if determinism() == "portable":
        os.environ.update(AVX2_VARIABLES)


def determinism() -> str:
    """`native`, or `portable` where the variable says so and the CPU has AVX2; a ConfigError on other values."""
    wanted = os.environ.get(DETERMINISM_VAR, "native")
    if wanted not in ("portable", "native"):
        raise ConfigError(f"{DETERMINISM_VAR} is {wanted!r}: set it to portable or native")
    return "portable" if wanted == "portable" and "avx2" in _cpu_info("flags").split() else "native"


def describe_machine() -> dict[str, str]:
    """What the last bits of a result may depend on: CPU, instructions, threads, GPU, and versions of libraries."""
    import torch

    build = torch.__config__.show()
    backends = {"mkl": r"Math Kernel Library Version (\S+)", "onednn": r"MKL-DNN v(\S+)"}
    return {
        "determinism": determinism(),
        "cpu": _cpu_info("model name") or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
        **{name: match[1] for name, pattern in backends.items() if (match := re.search(pattern, build))},
        **_linked_code(),
    }


def _linked_code() -> dict[str, str]:
    """A digest of the installed code, where the project has links to it in place of files that git knows."""
    code = project_root() / "tasks"
    if not code.is_symlink():
        return {}
    files = sorted(path for folder in ("flows", "tasks") for path in (code.resolve().parent / folder).rglob("*.py"))
    return {"code": hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]}


def _cpu_info(key: str) -> str:
    """What Linux says of the first CPU; empty where it does not."""
    text = CPU_INFO.read_text(encoding="utf-8") if CPU_INFO.is_file() else ""
    match = re.search(rf"^{key}\s*: (.*)$", text, re.MULTILINE)
    return match[1] if match else ""
