"""A disk that is full or read-only is one message, whichever library meets it first."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.core.errors import StageError, TrainingError, disk_errors

ROOT = Path(__file__).resolve().parents[3]


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/file")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (full(), r"^sft: no space left on the disk \(/data/file\): free some, then run again$"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/f"), r"^sft: no space left on the disk \(/f\)"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), r"^sft: no space left on the disk \(/"),
        (OSError(errno.EROFS, "x", "/f"), r"^sft: /f cannot be used \(read-only file system\): let this user"),
        (PermissionError(errno.EACCES, "x", "/f"), r"^sft: /f cannot be used \(permission denied\): let this user"),
        (RuntimeError("(os error 30) Read-only file system"), r"cannot be used \(read-only file system\)"),
    ],
)
def test_it_is_named_with_its_cure(error: Exception, message: str) -> None:
    with pytest.raises(StageError, match=message), disk_errors("sft"):
        raise error


def test_an_error_that_another_one_hides_counts() -> None:
    """As torch raises one of its own while a file of Python's fails to write."""
    hiding = RuntimeError("unexpected pos 64 vs 0")
    hiding.__context__ = full()
    with pytest.raises(StageError, match="/data/file"), disk_errors():
        raise hiding


@pytest.mark.parametrize("error", [KeyError("x"), PermissionError(errno.EPERM, "not a file"), TrainingError("nan")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, disk_errors("sft"):
        raise error
    assert raised.value is error


WRITE = """
import os, sys
os.chdir(sys.argv[1])
import torch
from safetensors.torch import save_file
from tasks.core.errors import disk_errors
weights = {"w": torch.zeros(2**20)}
for write in (lambda: torch.save(weights, "a.pt"), lambda: save_file(weights, "a.safetensors")):
    try:
        with disk_errors("sft"):
            write()
    except Exception as error:
        print(type(error).__name__, error)
"""

MOUNT = 'mount -t tmpfs -o size=1m,"$1" tmpfs "$0" && exec "$2" -c "$3" "$0"'


@pytest.mark.parametrize(("option", "words"), [("rw", "no space left"), ("ro", "cannot be used (read-only")])
def test_torch_and_safetensors_on_such_a_disk(tmp_path: Path, option: str, words: str) -> None:
    """In a mount namespace of its own, which is gone with its process."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNT, str(tmp_path), option]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, sys.executable, WRITE], env=environment, capture_output=True, text=True, check=False
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("this system lets nobody mount a disk in a namespace of his own")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["StageError"] * 2, done.stdout + done.stderr
    assert all(words in line for line in lines), lines
