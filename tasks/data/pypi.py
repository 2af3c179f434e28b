"""Download pinned files from a Python package index, with pip's configuration (mirrors, proxies, find-links).

A distribution is only ever a file here: it is found by pip's finder, streamed, checked against its SHA-256 and kept in
the cache. None of its code runs: no metadata build, no import, no install.
"""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from tasks.core.errors import SourceError
from tasks.data import pip_download

__all__ = ["fetch", "sha256_of"]

PIP_RANGE = "pip>=22.0,<27"

logger = logging.getLogger(__name__)


def fetch(requirement: str, *, form: Literal["sdist", "wheel"], sha256: str, cache: Path) -> Path:
    """Fetch the distribution `package==version` with this checksum, from the cache or pip's indexes.

    Args:
        requirement: `package==version`.
        form: whether the source distribution or the wheel is meant.
        sha256: hexadecimal checksum that the file must have.
        cache: folder for downloads; the file is kept under `<cache>/<sha256>/` and used again without any network.

    Raises:
        SourceError: the requirement is not pinned, no index offers it, the network fails, the checksum differs, or
            this pip's internals are not the expected ones.
    """
    name, separator, version = (part.strip() for part in requirement.partition("=="))
    if not (name and separator and version):
        raise SourceError(f"{requirement!r} is not pinned: write it as package==version")
    cached = cache / sha256
    if found := _cached_file(cached, sha256):
        return found
    cache.mkdir(parents=True, exist_ok=True)
    logger.info("downloading %s (%s) from the index that pip is set to", requirement, form)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache) as temporary:
        request = {"name": name, "version": version, "form": form, "sha256": sha256, "folder": temporary}
        file = _verified_file(_run_pip(request, requirement), requirement, form, sha256)
        cached.mkdir(exist_ok=True)
        return (Path(temporary) / file).replace(cached / file)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cached_file(folder: Path, sha256: str) -> Path | None:
    """The cached file, unless it is missing or its checksum differs."""
    for path in sorted(folder.glob("*")):
        if path.is_file() and sha256_of(path) == sha256:
            return path
        logger.warning("%s does not match its checksum any more, so it is fetched again", path)
        path.unlink()
    return None


def _run_pip(request: dict[str, str], requirement: str) -> dict[str, Any]:
    """Result of the child process: `indexes` searched, files `tried`, and pip's `log`."""
    command = [sys.executable, "-I", pip_download.__file__]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    result = Path(request["folder"]) / pip_download.RESULT
    log = "\n".join((done.stderr + done.stdout).strip().splitlines()[-8:])
    if done.returncode or not result.is_file():
        raise SourceError(
            f"{requirement} could not be fetched: pip ended with status {done.returncode}.\n{log}\nIf this names a "
            f'missing module or attribute, install a known pip: `{sys.executable} -m pip install "{PIP_RANGE}"`.'
        )
    return {**json.loads(result.read_text(encoding="utf-8")), "log": log}


def _verified_file(result: dict[str, Any], requirement: str, form: str, sha256: str) -> str:
    """The name of the downloaded file whose checksum is right."""
    for item in result["tried"]:
        if item.get("sha256") == sha256:
            return str(item["file"])
    indexes = ", ".join(result["indexes"]) or "nowhere (--no-index without --find-links)"
    log = f"\npip said: {result['log']}" if result["log"] else ""
    if not result["tried"]:
        raise SourceError(
            f"no {form} of {requirement} was found at {indexes}: check the network and pip's index "
            f"(`pip config list`, PIP_INDEX_URL), then run again.{log}"
        )
    broken = [f"{item['file']}: {item['error']}" for item in result["tried"] if "error" in item]
    if len(broken) == len(result["tried"]):
        raise SourceError(
            f"{requirement} ({form}) could not be downloaded from {indexes}: {'; '.join(broken)}; check the network, "
            f"the proxy and the free disk space, then run again.{log}"
        )
    found = ", ".join(f"{item['file']} {item['sha256']}" for item in result["tried"] if "sha256" in item)
    raise SourceError(
        f"{requirement} ({form}) is not the pinned file: its SHA-256 should be {sha256}, got {found} from {indexes}; "
        "do not use it: check the mirror, or the checksum in params.yaml"
    )
