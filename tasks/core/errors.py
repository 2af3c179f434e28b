"""Errors that a user can cause. A message names what is wrong, where, what was found, and the cure."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "ConfigError", "DataError", "ModelError", "RLHFError", "SourceError", "StageError", "TrainingError",
    "describe_disk_error", "disk_errors", "first_line",
]  # fmt: skip

FULL, FORBIDDEN = (errno.ENOSPC, errno.EDQUOT), (errno.EROFS, errno.EACCES, errno.EPERM)
MIN_FREE_BYTES = 2**20  # below it a disk counts as full: some libraries' own messages blame something else


class RLHFError(Exception):
    """Base of every error that a user can cause and fix; the command line prints it without a traceback."""


class ConfigError(RLHFError):
    """A key or value in params.yaml, a preset or an override is wrong."""


class DataError(RLHFError):
    """Rows are missing, malformed, or too few to go on with."""


class SourceError(RLHFError):
    """A data or model source cannot be reached, or is not what its checksum promises."""


class ModelError(RLHFError):
    """A model folder is incomplete or does not fit the stage that reads it."""


class TrainingError(RLHFError):
    """Training cannot go on: a quantity is not finite, or the policy has left the region where updates make sense."""


class StageError(RLHFError):
    """A stage failed, or dvc.yaml and the code disagree about it."""


def first_line(error: BaseException) -> str:
    """The first line of a library's message, or the error's type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def disk_errors(where: str = "") -> Iterator[None]:
    """Convert what a disk that is full or may not be used makes any library raise to a StageError."""
    try:
        yield
    except RLHFError:
        raise
    except Exception as error:
        if problem := describe_disk_error(error):
            raise StageError(f"{where}: {problem}" if where else problem) from error
        raise


def describe_disk_error(error: BaseException) -> str | None:
    """What is wrong, and the cure, if the error comes from a disk that is full or may not be used; else None."""
    part: BaseException | None = error
    while part is not None:
        file = part.filename if isinstance(part, OSError) else None
        number = part.errno if isinstance(part, OSError) else None
        if number in FULL or any(os.strerror(known) in str(part) for known in FULL):
            return f"no space left on the disk ({file or Path.cwd()}): free some, then run again"
        if (file and number in FORBIDDEN) or os.strerror(errno.EROFS) in str(part):
            reason = os.strerror(number or errno.EROFS).lower()
            return f"{file or Path.cwd()} cannot be used ({reason}): let this user read and write it, then run again"
        part = part.__cause__ or part.__context__
    if shutil.disk_usage(Path.cwd()).free < MIN_FREE_BYTES:
        return f"no space left on the disk ({Path.cwd()}): free some, then run again"
    return None
