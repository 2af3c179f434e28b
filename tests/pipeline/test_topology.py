"""The servers of infra/compose/compose.yaml as processes of this machine, and a deployment that its worker runs.

Commands and environments are those of that file. What differs: all of them listen on free ports of loopback, PostgreSQL
is the one installed here, and moto stands for the S3 gateway.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest
from ruamel.yaml import YAML

from flows.services import free_port
from tests.pipeline.conftest import ROOT, STAGES, Project, WarmPython, answers, make_project, wait_for

pytestmark = pytest.mark.slow

COMPOSE = ROOT / "infra" / "compose"
HOST = "127.0.0.1"
PASSWORDS = {"MLFLOW_DB_PASSWORD": "mlflowword", "PREFECT_DB_PASSWORD": "prefectword"}
HEALTH = {"mlflow": "health", "prefect": "api/health", "worker": "health"}
START_SECONDS, STOP_SECONDS = 180.0, 60.0


@dataclass(frozen=True)
class Topology:
    """The project in which the worker runs, with its environment, and where the servers listen."""

    project: Project
    ports: Mapping[str, int]

    def ask(self, database: str, question: str) -> list[tuple[Any, ...]]:
        """What PostgreSQL answers to the role of that database."""
        place = {"host": HOST, "port": self.ports["postgres"], "dbname": database, "user": database}
        password = PASSWORDS[f"{database.upper()}_DB_PASSWORD"]
        with closing(psycopg2.connect(**place, password=password)) as connection, connection.cursor() as cursor:
            cursor.execute(question)
            return list(cursor.fetchall())

    def table(self, run: str) -> list[list[Any]]:
        """The rows that MLflow's page shows of a run's samples."""
        url = f"http://{HOST}:{self.ports['mlflow']}/get-artifact?run_uuid={run}&path=samples.json"
        with urllib.request.urlopen(url) as response:
            return list(json.load(response)["data"])


def services(ports: Mapping[str, int], secrets: Mapping[str, str]) -> Any:
    """Those of the compose file, with these ports of this machine for their names."""
    text = (COMPOSE / "compose.yaml").read_text(encoding="utf-8")
    text = re.sub(r"\$\{(\w+)[^}]*\}", lambda found: secrets.get(found[1], ""), text)
    for name, port in ports.items():
        text = re.sub(rf"\b{name}:\d+", f"{HOST}:{port}", text)
    return YAML(typ="safe").load(text)["services"]


@contextmanager
def serving(
    command: list[str], is_up: Callable[[], bool], log: Path, *, end: signal.Signals = signal.SIGTERM, **options: Any
) -> Iterator[None]:
    """A process from when it is up until it is told to end; nothing that it started may be left then.

    SIGINT, which Prefect's worker sends itself, is in force as in a container, and not as in a shell's background job.
    """
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with log.open("wb") as output:
        process = psutil.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, **options)

    def check() -> bool:
        assert process.status() != psutil.STATUS_ZOMBIE, f"{command} ended:\n{log.read_text()}"
        return is_up()

    try:
        wait_for(check, seconds=START_SECONDS)
        yield
    finally:
        family = [*process.children(recursive=True), process]
        process.send_signal(end)
        _, left = psutil.wait_procs(family, STOP_SECONDS)
        for member in left:
            member.kill()
        assert not left, f"{command} left {left} behind"


@contextmanager
def postgres(port: int, environment: dict[str, str]) -> Iterator[None]:
    """PostgreSQL with compose's databases. It refuses to run as root, and its folder must belong to its user."""
    with tempfile.TemporaryDirectory() as name:
        folder, password = Path(name), Path(name) / "password"
        password.write_text(environment["POSTGRES_PASSWORD"])
        own: dict[str, Any] = {"cwd": folder, "env": environment}
        if os.geteuid() == 0:
            own["user"] = "nobody"
            shutil.chown(folder, "nobody")
            shutil.chown(password, "nobody")
        create = ["initdb", "--pgdata=data", "--username=postgres", "--encoding=UTF8", "--no-sync"]
        create += ["--auth=scram-sha-256", "--pwfile=password"]
        subprocess.run(create, stdout=subprocess.DEVNULL, check=True, **own)
        command = ["postgres", "-D", "data", "-h", HOST, "-p", str(port), "-k", name, "-F"]
        ready = ["pg_isready", "--quiet", f"--host={HOST}", f"--port={port}"]
        is_up = partial(subprocess.call, ready, env=environment)
        with serving(command, lambda: is_up() == 0, folder / "log", end=signal.SIGINT, **own):
            client = {"PGHOST": name, "PGPORT": str(port), "PGPASSWORD": environment["POSTGRES_PASSWORD"]}
            variables = environment | client | {"POSTGRES_USER": "postgres"}
            subprocess.run([COMPOSE / "databases.sh"], env=variables, stdout=subprocess.DEVNULL, check=True)
            yield


@pytest.fixture(scope="module")
def topology(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], python: WarmPython, s3: Any
) -> Iterator[Topology]:
    """All of it, in the order in which compose starts it; nothing of it stays behind."""
    folder = tmp_path_factory.mktemp("topology")
    ports = {name: free_port() for name in ("postgres", "mlflow", "prefect", "worker")}
    ports["s3"] = int(s3.meta.endpoint_url.rpartition(":")[2])
    keys = {"S3_ACCESS_KEY": environment["AWS_ACCESS_KEY_ID"], "S3_SECRET_KEY": environment["AWS_SECRET_ACCESS_KEY"]}
    described = services(ports, {"POSTGRES_PASSWORD": "word", "PREFECT_AUTH": "user:word", **PASSWORDS, **keys})

    own = {key: value for key, value in environment.items() if not key.startswith(("PREFECT", "AWS"))}
    own |= {"PREFECT_HOME": str(folder / "home"), "PREFECT_WORKER_WEBSERVER_HOST": HOST}
    own |= {"PREFECT_WORKER_WEBSERVER_PORT": str(ports["worker"])}
    debian = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path())  # Debian keeps it off the PATH
    own["PATH"] += f"{os.pathsep}{debian}"
    if not shutil.which("initdb", path=own["PATH"]):
        pytest.skip("no PostgreSQL here; on Debian: apt-get install postgresql")

    for volume in described["s3"]["volumes"]:
        s3.create_bucket(Bucket=volume.rpartition("/")[2])
    project = make_project(folder / "project", python, own | described["worker"]["environment"])
    for name in ("prefect.yaml", "infra/work_pools/process.json"):
        (project.root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, project.root / name)
    with ExitStack() as stack:
        stack.enter_context(postgres(ports["postgres"], own | described["postgres"]["environment"]))
        for name, path in HEALTH.items():
            address = [] if name == "worker" else ["--host", HOST, "--port", str(ports[name])]
            command = [*described[name]["command"], *address]
            is_up = partial(answers, f"http://{HOST}:{ports[name]}/{path}")
            options = {"cwd": project.root, "env": own | described[name]["environment"]}
            stack.enter_context(serving(command, is_up, folder / f"{name}.log", **options))
        yield Topology(project, ports)
    assert project.processes() == []


def test_the_worker_runs_a_deployment(topology: Topology) -> None:
    """With the commands of infra/compose/README.md; Prefect keeps what became of it in PostgreSQL."""
    project = topology.project
    project.dvc("remote", "add", "--default", "store", "s3://rlhf-dvc")
    project.command("prefect", "deploy", "--all")
    project.command("prefect", "deployment", "run", "rlhf/nightly", "--param", "push=true", "--watch")
    assert project.ran() == list(STAGES)
    runs = "select flow.name, state_name from flow_run join flow on flow.id = flow_id where state_type != 'SCHEDULED'"
    assert topology.ask("prefect", runs) == [("rlhf", "Completed")]
    assert "/presigned/" not in project.root.with_name("mlflow.log").read_text(), "the store's address is the server's"


def test_mlflow_has_numbers_in_postgresql_and_tables_in_the_store(topology: Topology, s3: Any) -> None:
    runs = dict(topology.ask("mlflow", "select name, run_uuid from runs where status = 'FINISHED'"))
    assert sorted(runs) == sorted([*STAGES, "pipeline"])
    assert topology.ask("mlflow", "select count(*) from runs") == [(len(runs),)]
    kept = objects(s3, "rlhf-mlflow")
    for run in (runs[name] for name in STAGES):
        assert topology.table(run) == [[1, "p", 1.0], [2, "p", 2.0]]
        assert [key for key in kept if f"/{run}/" in key and key.endswith("/samples.json")]


def test_dvc_has_sent_results_and_run_cache_to_the_store(topology: Topology, s3: Any) -> None:
    assert {key.partition("/")[0] for key in objects(s3, "rlhf-dvc")} == {"files", "runs"}


def objects(s3: Any, bucket: str) -> list[str]:
    return [entry["Key"] for entry in s3.list_objects_v2(Bucket=bucket)["Contents"]]
