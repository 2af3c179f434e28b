"""Find one distribution with pip's finder and download it; runs as `python -I pip_download.py`.

pip has no command that downloads a source distribution without running its build code for the metadata, so this asks
pip's own `download` command for its session and finder, which carry the user's whole configuration (index, extra
indexes, find-links, proxy, certificate, credentials), and stops before anything is unpacked. Only names that have been
there from pip 22.0 to 26 are used; `tasks.data.pypi` turns a missing one into a clear error.

Reads a JSON object on standard input, writes `result.json` into the destination folder. Nothing here may import the
project: it is not on the path.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["RESULT"]

RESULT = "result.json"
_CHUNK = 1 << 20  # bytes


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
    except OSError as error:  # every error of requests is an OSError, and so is a full disk
        return {"file": name, "error": f"{type(error).__name__}: {error}"}
    except Exception as error:  # pip's and urllib3's own trees (proxy, certificate, a connection cut in the middle)
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


def _main() -> int:
    from pip._internal.cli.status_codes import SUCCESS
    from pip._internal.commands.download import DownloadCommand

    request = json.load(sys.stdin)

    class Fetch(DownloadCommand):
        """pip's `download` with everything after the finding replaced."""

        def run(self, options: Any, args: list[str]) -> int:
            result = _fetch(self, options, request)
            (Path(request["folder"]) / RESULT).write_text(json.dumps(result), encoding="utf-8")
            return SUCCESS

    return Fetch("download", "Download without building.").main(["--no-input"])


if __name__ == "__main__":
    sys.exit(_main())
