"""Fetching pinned distributions: through pip's settings, checked, cached, and without running a line of their code."""

import base64
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import pytest

from tasks.core.errors import SourceError
from tasks.data import pypi
from tasks.data.pypi import fetch
from tests.unit.data.test_film_reviews import packed

NO_SUCH = "0" * 64
Evil = tuple[Path, str, Path]
BACKEND = """
import pathlib
pathlib.Path({marker!r}).touch()
def get_requires_for_build_wheel(config_settings=None): return []
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder) / "evil-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: evil\\nVersion: 1.0\\n")
    return info.name
"""


@pytest.fixture(autouse=True)
def _only_these_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    settings = {"CONFIG_FILE": os.devnull, "RETRIES": "0", "NO_CACHE_DIR": "1", "DISABLE_PIP_VERSION_CHECK": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)


def get(sha256: str, folder: Path, form: Literal["sdist", "wheel"] = "sdist") -> Path:
    return fetch("evil==1.0", form=form, sha256=sha256, cache=folder / "cache")


@pytest.fixture
def evil(tmp_path: Path) -> Evil:
    """A folder with an sdist whose build code leaves a marker; its checksum; the marker."""
    marker = tmp_path / "code-has-run"
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": BACKEND.format(marker=str(marker)),
        "setup.py": BACKEND.format(marker=str(marker)),
        "PKG-INFO": "Metadata-Version: 1.0\nName: evil\nVersion: 1.0\n",
    }
    content = packed({f"evil-1.0/{name}": text.encode() for name, text in files.items()})
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "evil-1.0.tar.gz").write_bytes(content)
    return tmp_path / "links", hashlib.sha256(content).hexdigest(), marker


@pytest.fixture
def found(evil: Evil, monkeypatch: pytest.MonkeyPatch) -> Evil:
    """The same, which pip is set to look into."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(evil[0]))
    return evil


def index_of(folder: Path, root: Path) -> Path:
    """A package index (PEP 503) of plain files over the one distribution in a folder."""
    page = Path(shutil.copytree(folder, root / "simple" / "evil"))
    (file,) = page.iterdir()
    link = f'<a href="{file.name}#sha256={hashlib.sha256(file.read_bytes()).hexdigest()}">{file.name}</a>'
    (page / "index.html").write_text(f"<!DOCTYPE html><html><body>{link}</body></html>")
    return page.parent


def test_no_code_of_the_distribution_runs_although_pip_download_would_run_it(found: Evil, tmp_path: Path) -> None:
    folder, sha256, marker = found
    assert get(sha256, tmp_path).read_bytes() == (folder / "evil-1.0.tar.gz").read_bytes()
    assert not marker.exists(), "the build code of a downloaded distribution was run"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(tmp_path / "pip"), "evil==1.0"]
    subprocess.run(command, check=True, capture_output=True)
    assert marker.exists(), "pip download no longer runs build code: the trap is not armed, so this test shows nothing"


def test_the_index_of_pips_settings_is_used_even_where_source_distributions_may_not_be_installed(
    evil: Evil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sha256, marker = evil
    monkeypatch.setenv("PIP_INDEX_URL", index_of(folder, tmp_path).as_uri())
    monkeypatch.setenv("PIP_ONLY_BINARY", ":all:")
    assert get(sha256, tmp_path).is_file()
    assert not marker.exists()


def test_a_cached_file_needs_no_index_and_a_damaged_one_is_fetched_again(
    found: Evil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = get(found[1], tmp_path)
    assert [item.name for item in (tmp_path / "cache").iterdir()] == [found[1]], "temporary files were left behind"
    path.write_bytes(b"damaged")
    assert get(found[1], tmp_path).read_bytes() != b"damaged"
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert get(found[1], tmp_path) == path


def test_another_file_under_the_pinned_name_is_refused_and_not_kept(found: Evil, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"should be {NO_SUCH}, got evil-1.0.tar.gz {found[1]}"):
        get(NO_SUCH, tmp_path)
    assert not list((tmp_path / "cache").iterdir())


def test_a_wheel_is_not_taken_for_a_source_distribution(found: Evil, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no wheel of evil==1\.0 was found at .*links"):
        get(found[1], tmp_path, "wheel")


def test_without_a_network_the_message_names_index_and_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://someone:secret@127.0.0.1:9/simple")
    with pytest.raises(SourceError) as caught:
        get(NO_SUCH, tmp_path)
    expected = "no sdist of evil==1.0 was found at http://someone:****@127.0.0.1:9/simple: check the network and pip's"
    assert expected in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not list((tmp_path / "cache").iterdir())


class _Guarded(SimpleHTTPRequestHandler):
    """Serves files to one user; an archive breaks off after ten bytes."""

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != "Basic " + base64.b64encode(b"someone:secret").decode():
            self.send_error(401)
        elif self.path.endswith(".tar.gz"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"0123456789")
        else:
            super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def guarded(evil: Evil, tmp_path: Path) -> Iterator[int]:
    index_of(evil[0], tmp_path)
    handler = functools.partial(_Guarded, directory=str(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_a_download_that_breaks_off_is_an_error_and_leaves_nothing(
    guarded: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"http://someone:secret@127.0.0.1:{guarded}/simple")
    with pytest.raises(SourceError, match=r"could not be downloaded|is not the pinned file") as caught:
        get(NO_SUCH, tmp_path)
    assert "secret" not in str(caught.value)
    assert not list((tmp_path / "cache").iterdir())


def test_a_pip_without_the_expected_internals_is_named_with_the_range_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pypi, "_CHILD", "from pip._internal.commands.download import NoSuchName")
    with pytest.raises(SourceError, match=r'(?s)cannot import name .NoSuchName.*pip install "pip>='):
        get(NO_SUCH, tmp_path)


def test_an_unpinned_requirement_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="'evil' is not pinned: write it as package==version"):
        fetch("evil", form="sdist", sha256=NO_SUCH, cache=tmp_path)
