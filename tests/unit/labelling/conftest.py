"""A labelling database of each kind: SQLite in a file, and a PostgreSQL cluster that lives as long as the tests."""

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from tasks.core.rows import Prompt, write_rows
from tasks.labelling.store import LabelStore
from tests.support.labels import memory_store
from tests.support.tiny_stages import write_parts

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin")) if Path("/usr/lib/postgresql").is_dir() else []
KINDS = ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Callable[[str], str]]:
    """The URL of a database of this name in a PostgreSQL cluster that listens on a socket alone."""
    found = shutil.which("pg_ctl")
    folder = Path(found).parent if found else BINARIES[-1] if BINARIES else None
    user = "postgres" if os.getuid() == 0 else ""
    if folder is None or (user and not shutil.which("setpriv")):
        pytest.skip("no PostgreSQL binaries here")
    with tempfile.TemporaryDirectory(prefix="rlhf-postgresql-") as place:  # pytest's own are closed to another user
        if user:
            try:
                shutil.chown(place, user)
            except LookupError:
                pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []

        def run(program: str, *words: str) -> None:
            command = [*become, str(folder / program), "-D", f"{place}/data", *words]
            subprocess.run(command, check=True, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        run("initdb", "-U", "label", "-A", "trust", "-E", "UTF8", "--no-sync")
        run("pg_ctl", "-w", "-l", f"{place}/log", "-o", f"-c listen_addresses='' -k {place}", "start")
        try:
            yield lambda name: f"postgresql+psycopg2://label:word@/{name}?host={place}"
        finally:
            run("pg_ctl", "-w", "-m", "immediate", "stop")


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'labels.db'}"
    cluster = request.getfixturevalue("cluster")
    name = f"labels_{uuid.uuid4().hex}"
    engine = create_engine(cluster("postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"create database {name}"))
    engine.dispose()
    return str(cluster(name))


@pytest.fixture
def open_store(url: str) -> Iterator[Callable[..., LabelStore]]:
    """Opens the database; each store is closed at the end."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(closing(LabelStore(url, **options)))


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts: a base model, an SFT model, PPO and eight prompts."""
    folder = tmp_path_factory.mktemp("parts")
    rows = [Prompt(id=str(number), prompt=text) for number, text in enumerate("abcdefgh")]
    write_rows(folder / "prepare" / "prompts" / "train.jsonl", rows)
    return write_parts(folder)


@pytest.fixture
def store() -> Iterator[LabelStore]:
    """An empty store in memory."""
    with closing(memory_store()) as store:
        yield store
