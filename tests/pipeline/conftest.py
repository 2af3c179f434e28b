"""A small project of four toy stages under the real flows, DVC, MLflow and Prefect.

The toy stages carry the names and signatures of real ones, so that the real params.yaml fits, but write a line of text
in a moment. Every command runs in its own process, as a person would start it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient

from flows.prefect_runs import DEVICE_LIMIT
from flows.services import free_port, prefect_client
from tests.conftest import SHIPPED_PARAMS

ROOT = Path(__file__).resolve().parents[2]

STAGES = {
    "collect": ("params, seed: int", ""),
    "prepare": ("params, seed: int", "artifacts.collect"),
    "sft": ("params, lora, seed: int", "artifacts.prepare"),
    "gold_judge": ("params, seed: int", "artifacts.prepare"),
}
"""Stage → the sections that its function takes, and the folder that it reads."""

STAGE = """
import json, os, pathlib, time
from tasks.core import tracking
from tasks.core.errors import TrainingError
from tasks.shared import mark

def {name}({sections}, artifacts):
    out = artifacts.out
    state = pathlib.Path(".rlhf")
    state.mkdir(exist_ok=True)
    with (state / "ran").open("a") as file:
        file.write("{name}\\n")
    trace = (state / "trace").open("a", buffering=1)
    trace.write("{name} begins\\n")
    read = [(folder / "result" / "data.txt").read_text() for folder in [{reads}]]
    (out / "result").mkdir()
    if (state / "sleep").exists():
        time.sleep(float((state / "sleep").read_text()))
    if (state / "meet").exists() and "{name}" in ("sft", "gold_judge"):
        (state / "here.{name}").touch()
        while not all((state / f"here.{{other}}").exists() for other in ("sft", "gold_judge")):
            time.sleep(0.1)
    for kind, folder in (("output", out / "result"), ("checkpoint", tracking.checkpoint_dir())):
        if (state / f"{name}.{{kind}}").exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "more").write_bytes(os.urandom(int((state / f"{name}.{{kind}}").read_text())))
    if (state / "{name}.resumable").exists():
        folder = tracking.checkpoint_dir()
        resumed = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        (state / "resumed").write_text(str(resumed))
        if not resumed:
            (state / "waiting").touch()
            for _ in range(3000):
                if not (state / "go").exists():
                    time.sleep(0.1)
    if (state / "{name}.fails").exists():
        raise TrainingError("the toy was told to fail")
    (out / "result" / "data.txt").write_text("".join([*read, mark, "{name}", str(seed), params.model_dump_json()]))
    tracking.log_metrics({{"loss": 0.5}}, step=1)
    tracking.log_samples("samples", [{{"prompt": "p", "reward": 1.0}}], step=1)
    tracking.log_samples("samples", [{{"prompt": "p", "reward": 2.0}}], step=2)
    metrics = {{"seed": seed, "inner": {{"one": 1}}}}
    (out / "metrics.json").write_text(json.dumps(metrics))
    trace.write("{name} ends\\n")
    trace.close()

if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage
    run_stage("{name}")
"""


PREPARED = "artifacts/prepare/result"


def dvc_stage(name: str, deps: str = "", params: str = "", outs: str = "", meta: str = "") -> str:
    """An entry of dvc.yaml: what it reads, is given and writes beside what all toys do."""
    return f"""
  {name}:
    cmd: python -m tasks.{name}
    meta: {{{meta}}}
    deps: [tasks/{name}.py, {deps}]
    params: [{params}]
    outs: [artifacts/{name}/result{outs}]
    metrics: [artifacts/{name}/metrics.json]
"""


DVC_YAML = "stages:" + "".join(
    [
        dvc_stage("collect", "tasks/shared.py, data.txt", "seed, collect"),
        dvc_stage("prepare", "tasks/shared.py, artifacts/collect/result", "seed, prepare"),
        dvc_stage("sft", f"tasks/shared.py, requirements.lock, {PREPARED}", "seed, sft, lora", meta="device: true"),
        dvc_stage("gold_judge", f"tasks/shared.py, {PREPARED}", "seed, gold_judge", meta="device: true"),
    ]
)

# Reads a store in a process of its own: MLflow keeps its store's address for a whole process.
RUNS = """
import json, sys
from mlflow import MlflowClient, artifacts, set_tracking_uri
set_tracking_uri(sys.argv[1])
client = MlflowClient()
experiment = client.get_experiment_by_name("rlhf")
found = []
for run in client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]):
    id, models = run.info.run_id, getattr(run.outputs, "model_outputs", [])
    row = {"id": id, "name": run.info.run_name, "status": run.info.status}
    row |= {"params": run.data.params, "metrics": run.data.metrics, "tags": run.data.tags}
    row["inputs"] = {item.dataset.name: item.dataset.digest for item in run.inputs.dataset_inputs}
    row["models"] = [client.get_logged_model(item.model_id).tags for item in models]
    row["loss"] = [(point.step, point.value) for point in client.get_metric_history(id, "loss")]
    if client.list_artifacts(id):
        row["samples"] = artifacts.load_dict(f"runs:/{id}/samples.json")
    found.append(row)
print("FOUND" + json.dumps(found))
"""

STATE = """
select flow_run_state.type, flow_run_state.name, flow_run_state.message from flow_run_state
join flow_run on flow_run.state_id = flow_run_state.id where flow_run.id = ?
"""


# Imported by every Python that runs with this folder on its path: writes down what each stage opens.
WATCH = """
import os, sys
log, root = os.environ.get("RLHF_OPENED"), os.getcwd()

def watch(event, arguments):
    tracking = sys.modules.get("tasks.core.tracking")
    run = getattr(tracking, "_active", None)
    if event == "open" and run is not None and isinstance(arguments[0], (str, bytes)):
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if path.startswith(root + "/artifacts/"):
            log_file.write(f"{run.stage} {os.path.relpath(path, root)}\\n")

if log:
    log_file = open(log, "a", buffering=1)
    sys.addaudithook(watch)
"""


class WarmPython:
    """See warm_python.py."""

    def __init__(self, environment: dict[str, str]) -> None:
        command, pipe = [sys.executable, str(Path(__file__).with_name("warm_python.py"))], subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
        self.environment = environment

    def rlhf(self, root: Path, words: Sequence[str]) -> tuple[int, str]:
        """Exit status and output of `rlhf` in that project."""
        assert self.process.stdin
        assert self.process.stdout
        output = root / ".rlhf-output"
        request = {"root": str(root), "words": words, "output": str(output)}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline()), output.read_text()


class Project:
    """A project folder and the commands that a person runs in it."""

    def __init__(self, root: Path, python: WarmPython, environment: dict[str, str] | None = None) -> None:
        self.root, self.python, self.environment = root, python, environment or python.environment

    def command(self, *words: str, expect: int = 0, **options: Any) -> str:
        """Run a command, check its exit status, and return what it printed."""
        options = {"cwd": self.root, "env": self.environment, "timeout": PATIENCE, **options}
        done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
        return checked(words, done.returncode, done.stdout + done.stderr, expect)

    def rlhf(self, *words: str, expect: int = 0) -> str:
        """Run our command and return what it printed."""
        status, output = self.python.rlhf(self.root, words)
        return checked(words, status, output, expect)

    def start(self, *words: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Run our command in the background, in a process group of its own, Ctrl-C in force as in a terminal.

        A shell starts background jobs with SIGINT ignored, and children inherit that.
        """
        return subprocess.Popen(
            [sys.executable, "-m", "flows.cli.main", *words],
            cwd=self.root,
            env=environment or self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def dvc(self, *words: str, expect: int = 0) -> str:
        return self.command(sys.executable, "-m", "dvc", *words, expect=expect)

    def ran(self) -> list[str]:
        """The stages that computed something since the last call, in order."""
        path = self.root / ".rlhf" / "ran"
        names = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return names

    def lock(self) -> str:
        return (self.root / "dvc.lock").read_text()

    def wait_for(self, name: str) -> None:
        """Return as soon as the file exists."""
        wait_for((self.root / name).exists)

    def wait_for_end(self) -> None:
        """Return as soon as no process works in the project's folder."""
        wait_for(lambda: not self.processes())

    def start_and_hold(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        """Start a run with more epochs of sft, which waits there after its first checkpoint."""
        (self.root / ".rlhf" / "sft.resumable").touch()
        (self.root / ".rlhf" / "waiting").unlink(missing_ok=True)
        self.edit("params.yaml", "epochs: 1", "epochs: 3")
        process = self.start(*words, **options)
        self.wait_for(".rlhf/waiting")
        return process

    def check_resumed(self, run: Callable[..., str] | None = None) -> str:
        """The next run computes sft alone, from its checkpoint; what it prints."""
        self.ran()
        output = (run or self.rlhf)("run")
        assert self.ran() == ["sft"]
        assert (self.root / ".rlhf" / "resumed").read_text() == "True", "it did not go on from its checkpoint"
        return output

    def runs(self, store: str = "sqlite:///mlflow.db") -> list[dict[str, Any]]:
        """The runs in MLflow, the oldest first."""
        output = self.command(sys.executable, "-W", "ignore", "-c", RUNS, store)
        return list(json.loads(output.partition("FOUND")[2].partition("\n")[0]))

    def services(self) -> dict[str, dict[str, Any]]:
        """What `rlhf up` has started."""
        return {row["name"]: row for row in json.loads((self.root / ".rlhf/services/services.json").read_text())}

    def ask(self, question: str, *values: str) -> list[tuple[Any, ...]]:
        """What the standing Prefect server's database says."""
        return query(self.root / ".rlhf" / "services" / "prefect" / "prefect.db", question, *values)

    def prefect(self) -> AbstractContextManager[SyncPrefectClient]:
        """A client of the standing Prefect server."""
        return prefect_client(self.services()["prefect"]["address"])

    def run_deployment(self, name: str, **parameters: Any) -> UUID:
        """Let the standing Prefect server run a deployment now; the flow run's id."""
        with self.prefect() as client:
            deployment = client.read_deployment_by_name(name)
            return client.create_flow_run_from_deployment(deployment.id, parameters=parameters).id

    def wait_for_state(self, run: UUID | str, name: str) -> str:
        """The message of the flow run's state, as soon as that has this name; no other may end it."""

        def reached() -> bool:
            ((kind, found, message),) = self.ask(STATE, str(run))
            assert found == name or kind not in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"), f"{found}: {message}"
            return bool(found == name)

        wait_for(reached)
        return str(self.ask(STATE, str(run))[0][2])

    def worktrees(self) -> set[str]:
        """Names of the worktrees beside the project itself."""
        lines = self.command("git", "worktree", "list").splitlines()
        return {Path(line.split()[0]).name for line in lines[1:]}

    def edit(self, name: str, before: str, after: str) -> None:
        path = self.root / name
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, after, 1))

    def processes(self) -> list[psutil.Process]:
        """Every process that works in the project's folder."""
        return [item for item in psutil.process_iter(["cwd"]) if item.info["cwd"] == str(self.root)]

    def kill(self) -> None:
        """End every process that works in the project's folder, and whatever it has started elsewhere."""
        while members := self.processes():
            family = [process for member in members for process in (*_children(member), member)]
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family, 10)

    def commit(self) -> None:
        """Everything that git does not ignore."""
        for words in (["add", "-A"], ["commit", "--quiet", "-m", "all"]):
            subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=self.root, check=True)

    def copy(self, to: Path) -> Project:
        shutil.copytree(self.root, to, symlinks=True)
        return Project(to, self.python, self.environment)


def checked(words: Sequence[str], status: int, output: str, expect: int) -> str:
    """The output of a command that ended as expected; an error that it meets is never a traceback."""
    assert status == expect, f"{words} exited {status}:\n{output}"
    assert not expect or "Traceback" not in output, output
    return output


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


@contextmanager
def serving(command: Sequence[str], url: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A server from when it answers; it is killed in the end, with what it has started."""
    with subprocess.Popen(command, **options) as server:
        try:
            wait_for(lambda: answers(url))
            yield server
        finally:
            kill(server)


def kill(server: subprocess.Popen[bytes]) -> None:
    for process in [*psutil.Process(server.pid).children(recursive=True), server] if server.poll() is None else []:
        process.kill()
    server.wait()


@contextmanager
def prefect_server(root: Path, environment: dict[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Prefect's server in a process of its own, and its address."""
    port = free_port()
    command, url = [sys.executable, "-m", "flows.temporary_server", str(port)], f"http://127.0.0.1:{port}/api"
    options: dict[str, Any] = {"cwd": root, "env": environment, "stdin": subprocess.PIPE, "start_new_session": True}
    with serving(command, f"{url}/health", **options) as server:
        yield server, url


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Variables under which Prefect talks to one server that lives as long as the tests."""
    folder = str(Path(sys.executable).parent)
    ours = ("PREFECT", "MLFLOW", "RLHF", "DVC", "AWS")
    values = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    values |= {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    values |= {"AWS_ACCESS_KEY_ID": "name", "AWS_SECRET_ACCESS_KEY": "word", "AWS_DEFAULT_REGION": "us-east-1"}
    values |= {"PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")), "PREFECT_API_BLOCKS_REGISTER_ON_START": "false"}
    with prefect_server(ROOT, values) as (server, address):
        yield values | {"PREFECT_API_URL": address}
        server.communicate()


@pytest.fixture(scope="session")
def s3(environment: dict[str, str]) -> Iterator[Any]:
    """A client of an S3 store of its own, whose keys are those of the environment; its buckets are in memory."""
    import boto3

    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "--port", str(port)]
    options = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    keys = {key.lower(): environment[key] for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    client = contextlib.closing(boto3.client("s3", "us-east-1", endpoint_url=address, **keys))
    with serving(command, f"{address}/moto-api/", **options), client as opened:
        yield opened


@pytest.fixture(scope="session")
def python(environment: dict[str, str]) -> Iterator[WarmPython]:
    warm = WarmPython(environment)
    yield warm
    warm.process.communicate()


PATIENCE = 300.0
"""Seconds that a test waits: no measure of speed, but longer than a crowded machine ever needs."""


def wait_for(condition: Callable[[], bool], *, seconds: float = PATIENCE) -> None:
    """Return when the condition holds; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.1)


def is_dead(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def make_project(root: Path, python: WarmPython, environment: dict[str, str] | None = None) -> Project:
    """A fresh project of toy stages that is a git repository without a commit."""
    root.mkdir(parents=True)
    for folder in ("flows", "tasks/core", "tasks/config", "tasks/data", "tasks/runtime", "tasks/evals"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(SHIPPED_PARAMS, root)
    for name in (".gitignore", ".dvcignore", "tasks/__init__.py", ".dvc/config", ".dvc/.gitignore"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for name, (sections, reads) in STAGES.items():
        (root / "tasks" / f"{name}.py").write_text(STAGE.format(name=name, sections=sections, reads=reads))
    (root / "tasks" / "shared.py").write_text('mark = "a"\n')
    (root / "requirements.lock").write_text("toy==1\n")
    (root / "data.txt").write_text("data\n")
    (root / "dvc.yaml").write_text(DVC_YAML)
    subprocess.run(["git", "init", "--quiet", "."], cwd=root, check=True)
    return Project(root, python, environment)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, python: WarmPython) -> Project:
    """A project after its first `rlhf run`; tests copy it or leave it as it is."""
    project = make_project(tmp_path_factory.mktemp("finished") / "project", python)
    project.rlhf("run")
    assert project.ran() == list(STAGES)
    return project


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    """A copy of the finished project that a test may change."""
    return finished.copy(tmp_path / "project")


@pytest.fixture
def fresh(tmp_path: Path, python: WarmPython) -> Project:
    return make_project(tmp_path / "project", python)


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, python: WarmPython) -> Iterator[Project]:
    """A project with its services up and nothing run yet; whatever happens, none of them stays behind."""
    own = {key: value for key, value in python.environment.items() if key != "PREFECT_API_URL"}
    project = make_project(tmp_path_factory.mktemp("standing") / "project", python, own)
    shutil.copy(ROOT / "prefect.yaml", project.root)
    try:
        output = rlhf(project, "up", "--prefect-port", str(free_port()), "--mlflow-port", str(free_port()))
        assert "`rlhf down` ends them" in output
        yield project
    finally:
        project.kill()


def rlhf(project: Project, *words: str, expect: int = 0, **options: Any) -> str:
    """Run our command in a Python of its own, so that it sees the project's variables and not those of the tests."""
    return project.command(sys.executable, "-m", "flows.cli.main", *words, expect=expect, **options)


def query(path: Path, question: str, *values: str) -> list[tuple[Any, ...]]:
    """What an SQLite database says."""
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        return database.execute(question, values).fetchall()
    finally:
        database.close()


@contextmanager
def device_limit(project: Project) -> Iterator[None]:
    """Prefect's global limit as `rlhf up` makes it, one slot, on the server of the tests."""
    with prefect_client(project.environment["PREFECT_API_URL"]) as client:
        client.upsert_global_concurrency_limit_by_name(DEVICE_LIMIT, 1)
        try:
            yield
        finally:
            client.delete_global_concurrency_limit_by_name(DEVICE_LIMIT)


def copy_shipped(root: Path, *more: str) -> None:
    """What the project is made of, without the user's parameters and data, and these further files."""
    (root / "data").mkdir(parents=True)
    shutil.copy(ROOT / "data" / "README.md", root / "data")  # all else there is the user's
    shutil.copy(SHIPPED_PARAMS, root)
    folders = ("tasks", "flows", "infra", "custom", ".dvc")
    for name in (*folders, ".dvcignore", ".gitignore", "dvc.yaml", "requirements.lock", *more):
        if (ROOT / name).is_dir():
            skipped = shutil.ignore_patterns("__pycache__", "cache", "tmp", "config.local")
            shutil.copytree(ROOT / name, root / name, ignore=skipped)
        else:
            shutil.copy(ROOT / name, root / name)


@pytest.fixture
def tiny_copy(tiny: tuple[Project, str], tmp_path: Path) -> Project:
    """A copy of the finished tiny project that a test may change."""
    return tiny[0].copy(tmp_path / "project")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, python: WarmPython) -> tuple[Project, str]:
    """The project after `rlhf run --preset tiny` with lm-eval on, which also wrote down what each stage opened."""
    root = tmp_path_factory.mktemp("tiny") / "project"
    watch = tmp_path_factory.mktemp("watch")
    (watch / "sitecustomize.py").write_text(WATCH)
    copy_shipped(root)
    subprocess.run(["git", "init", "--quiet", "."], cwd=root, check=True)
    watched = python.environment | {"PYTHONPATH": str(watch), "RLHF_OPENED": str(watch / "opened")}
    project = Project(root, python, watched)
    benchmarks = "lm_eval={tasks: [held_out_perplexity, held_out_preferences], batch_size: 8}"
    output = rlhf(project, "run", "--preset", "tiny", "-S", benchmarks)
    return Project(root, python), output + (watch / "opened").read_text()
