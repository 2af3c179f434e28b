"""What real life does to a run. After each fault: nothing corrupt, no record lost, no process left, a true status."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from flows.services import free_port
from tests.pipeline.conftest import (
    PATIENCE,
    STAGES,
    Project,
    device_limit,
    kill,
    prefect_server,
    query,
    serving,
    wait_for,
)

pytestmark = pytest.mark.exhaustive


def sound(project: Project) -> None:
    """A run now completes, and afterwards everybody agrees that all is done."""
    project.rlhf("run")
    assert "up to date" in project.dvc("status")
    project.ran()
    assert project.rlhf("run").count("cached") == 4
    assert project.ran() == []
    for name in STAGES:
        assert name in (project.root / "artifacts" / name / "result" / "data.txt").read_text()


@pytest.mark.fault("SIGKILL to a run, in any stage", "the next run goes on from the checkpoint")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("own", [[], ["--parallel", "2"]], ids=["in the flow's process", "in its own"])
def test_killed_in_any_stage(project: Project, stage: str, own: list[str]) -> None:
    (project.root / ".rlhf" / f"{stage}.resumable").touch()
    project.edit("params.yaml", "seed: 0", "seed: 1")
    before = project.lock()
    process = project.start("run", *own)
    project.wait_for(".rlhf/waiting")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    project.wait_for_end()
    assert stage in project.dvc("status")
    if stage == "collect":
        assert project.lock() == before
    sound(project)
    assert (project.root / ".rlhf" / "resumed").read_text() == "True"


@contextmanager
def mlflow_server(project: Project, port: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", "sqlite:///mlflow.db"]
    command += ["--artifacts-destination", str(project.root / "served"), "--port", str(port), "--workers", "1"]
    options = {"cwd": project.root, "env": project.environment | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}}
    with (
        (project.root / ".rlhf" / "mlflow.log").open("ab") as log,
        serving(command, f"http://127.0.0.1:{port}/health", stdout=log, stderr=log, **options) as server,
    ):
        yield server


@pytest.mark.fault(
    "MLflow's server is killed during a run", "the run completes; every record is there once when it is back"
)
@pytest.mark.parametrize("own", [[], ["--parallel", "1"]], ids=["in the flow's process", "in its own"])
def test_mlflow_is_gone_while_stages_run(fresh: Project, own: list[str]) -> None:
    """Training goes on, what it says is kept, and once the server is back each number is there once."""
    port = free_port()
    store = f"http://127.0.0.1:{port}"
    environment = fresh.environment | {"MLFLOW_TRACKING_URI": store}
    (fresh.root / ".rlhf").mkdir()
    (fresh.root / ".rlhf" / "sleep").write_text("5")
    with mlflow_server(fresh, port) as server:
        process = fresh.start("run", *own, environment=environment)
        wait_for(lambda: "prepare begins" in trace(fresh))
        kill(server)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
    if not own:
        assert "warning: MLflow at http" in output
    assert fresh.ran() == list(STAGES)
    queue = fresh.root / ".rlhf" / "mlflow_queue"
    assert list(queue.glob("*.jsonl")), "what could not be written is kept"
    with mlflow_server(fresh, port):
        again = fresh.command(sys.executable, "-c", CONNECT, env=environment)
        assert "Traceback" not in again
        assert "refuses" not in again, again
        assert list(queue.iterdir()) == []
        rows = fresh.runs(store)
    assert sorted(row["name"] for row in rows) == sorted(["pipeline", *STAGES]), "each run once"
    assert {row["status"] for row in rows} == {"FINISHED"}
    found = {row["name"]: row for row in rows}
    for name in STAGES:
        assert found[name]["loss"] == [[1, 0.5]]
        assert found[name]["samples"]["data"] == [[1, "p", 1.0], [2, "p", 2.0]]
        assert found["pipeline"]["metrics"][f"{name}.inner.one"] == 1
        assert found["pipeline"]["tags"][f"{name}.run"] == found[name]["id"]


CONNECT = "from tasks.runtime import mlflow_runs; mlflow_runs.connect()"


def trace(project: Project) -> str:
    path = project.root / ".rlhf" / "trace"
    return path.read_text() if path.exists() else ""


@pytest.mark.fault("Prefect's server is killed during a run", "the run goes on without it, and completes")
def test_the_prefect_server_is_gone_while_a_stage_runs(project: Project) -> None:
    with prefect_server(project.root, project.environment) as (server, address):
        environment = project.environment | {"PREFECT_API_URL": address}
        (project.root / ".rlhf" / "sleep").write_text("4")
        (project.root / ".rlhf" / "trace").unlink()
        project.edit("params.yaml", "seed: 0", "seed: 1")
        process = project.start("run", environment=environment)
        wait_for(lambda: "collect begins" in trace(project))
        server.kill()
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, output
    assert output.count("the run goes on without it") == 1
    assert "Traceback" not in output
    project.wait_for_end()
    assert project.ran() == list(STAGES)
    (project.root / ".rlhf" / "sleep").unlink()
    assert {run["status"] for run in project.runs()} == {"FINISHED"}
    sound(project)


@pytest.mark.fault("a stage fails after Prefect's server is gone", "the stage's error is the message")
def test_an_error_without_a_prefect_server_is_the_error(project: Project) -> None:
    with prefect_server(project.root, project.environment) as (server, address):
        for name in ("sft.resumable", "sft.fails"):
            (project.root / ".rlhf" / name).touch()
        project.edit("params.yaml", "seed: 0", "seed: 1")
        process = project.start("run", environment=project.environment | {"PREFECT_API_URL": address})
        project.wait_for(".rlhf/waiting")
        server.kill()
    (project.root / ".rlhf" / "go").touch()
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 1
    assert "error: the toy was told to fail" in output
    assert "Traceback" not in output


@pytest.mark.fault("Ctrl-C after Prefect's server is gone", "one message, and the run has ended")
def test_interrupted_without_a_prefect_server(project: Project) -> None:
    with prefect_server(project.root, project.environment) as (server, address):
        project.edit("params.yaml", "seed: 0", "seed: 1")
        environment = project.environment | {"PREFECT_API_URL": address}
        process = project.start_and_hold("run", environment=environment)
        server.kill()
    os.kill(process.pid, signal.SIGINT)
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 130, output
    assert output.count("interrupted.") == 1
    assert "Traceback" not in output
    assert {run["name"] for run in project.runs() if run["status"] != "FINISHED"} == {"pipeline", "sft"}
    assert {run["status"] for run in project.runs()} == {"FINISHED", "KILLED"}


@pytest.mark.fault("Ctrl-C while a run waits for the device", "it ends")
def test_interrupted_while_it_waits_for_the_device(project: Project, finished: Project, tmp_path: Path) -> None:
    with device_limit(project):
        holder = finished.copy(tmp_path / "holder")
        holding = holder.start_and_hold("run")
        project.edit("params.yaml", "seed: 0", "seed: 1")
        process = project.start("run")
        assert process.stdout
        assert any("waiting for the device" in line for line in process.stdout)
        os.kill(process.pid, signal.SIGINT)
        output = process.communicate(timeout=PATIENCE)[0]
        assert process.returncode == 130, output
        # Killed, the holder leaves its slot to whoever waits next.
        process = project.start("run")
        assert process.stdout
        assert any("waiting for the device" in line for line in process.stdout)
        holding.kill()
        holding.communicate()
        holder.rlhf("run", "prepare")
        output = process.communicate(timeout=PATIENCE)[0]
        assert process.returncode == 0, output


@pytest.mark.fault("a cached file is cut in half", "noticed, and computed again")
def test_a_truncated_object_of_the_cache_is_never_used(project: Project) -> None:
    """Noticed, removed, and what it held is computed again."""
    lock = project.lock()
    result = project.root / "artifacts" / "prepare" / "result" / "data.txt"
    content = result.read_text()
    (cached,) = [path for path in (project.root / ".dvc/cache/files").rglob("*") if holds(path, content)]
    cached.chmod(0o644)
    cached.write_text(content[: len(content) // 2])
    cached.chmod(0o444)
    result.unlink()
    project.rlhf("run")
    assert result.read_text() == content
    assert project.ran() == ["prepare"]
    assert project.lock() == lock
    sound(project)


LAST_FLOW = """
select flow_run.state_name from flow_run join flow on flow.id = flow_run.flow_id
where flow.name = 'rlhf' order by flow_run.created desc limit 1
"""


@pytest.mark.fault("SIGINT or SIGTERM to a run", "the next run goes on from the checkpoint")
@pytest.mark.parametrize(
    ("number", "own"),
    [(signal.SIGTERM, []), (signal.SIGTERM, ["--parallel", "2"]), (signal.SIGINT, ["--parallel", "2"])],
    ids=["SIGTERM in the flow's process", "SIGTERM in its own", "SIGINT in its own"],
)
def test_terminated(project: Project, number: signal.Signals, own: list[str]) -> None:
    lock, before = project.lock(), len(project.runs())
    with device_limit(project):
        process = project.start_and_hold("run", *own)
        os.kill(process.pid, number)
        process.communicate(timeout=PATIENCE)
        project.wait_for_end()
        assert project.lock() == lock
        assert "sft" in project.dvc("status")
        newest = {run["name"]: run["status"] for run in project.runs()[before:]}
        assert newest == {"pipeline": "KILLED", "sft": "KILLED"}
        assert query(Path(project.environment["PREFECT_HOME"], "prefect.db"), LAST_FLOW) == [("Crashed",)]
        assert "waiting for the device" not in project.check_resumed()
    sound(project)


def holds(path: Path, content: str) -> bool:
    return path.is_file() and path.read_bytes() == content.encode()


@pytest.mark.fault("two runs and `dvc repro` at once", "each stage ran once")
def test_two_flows_and_dvc_repro_at_once(project: Project) -> None:
    (project.root / ".rlhf" / "sleep").write_text("1")
    project.edit("params.yaml", "seed: 0", "seed: 1")
    flows = [project.start("run"), project.start("run")]
    wait_for(lambda: "prepare begins" in trace(project).partition("gold_judge ends")[2])
    words, options = [sys.executable, "-m", "dvc", "repro"], {"cwd": project.root, "env": project.environment}
    repro = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    output = [flow.communicate(timeout=120)[0] for flow in flows]
    assert [flow.returncode for flow in flows] == [0, 0], output
    assert repro.returncode == 0 or "is busy" in repro.stderr, repro.stderr
    assert sorted(project.ran()) == sorted(STAGES)
    sound(project)


@pytest.mark.fault("the clock goes backwards", "what changed ran, and nothing else")
def test_the_clock_goes_backwards(project: Project) -> None:
    """All files come from the future: nothing has changed, so nothing runs, and what must run may."""
    future = 4_000_000_000
    for path in [*project.root.rglob("*.py"), project.root / "params.yaml", project.root / "data.txt"]:
        os.utime(path, (future, future))
    assert project.rlhf("run").count("cached") == 4
    project.edit("params.yaml", "epochs: 1", "epochs: 3")
    os.utime(project.root / "params.yaml", (future, future))
    project.rlhf("run")
    assert project.ran() == ["sft"]
    assert all(run["status"] == "FINISHED" for run in project.runs())


@contextmanager
def small_disk(project: Project, folder: str) -> Iterator[tuple[Path, Callable[..., str]]]:
    """A small disk under a folder of the project: the folder as seen there, and how to run commands there.

    It lies in a mount namespace of its own, which is gone with its last process.
    """
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNT, str(project.root / folder)]
    keeper = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert keeper.stdout
    try:
        if not (pid := keeper.stdout.readline().strip()):
            pytest.skip("this system lets nobody mount a disk in a namespace of his own")
        enter = ["nsenter", "--target", pid, "--user", "--mount", "--preserve-credentials", f"--wd={project.root}"]
        yield Path(f"/proc/{pid}/root{project.root / folder}"), partial(project.command, *enter)
    finally:
        keeper.communicate()


MOUNT = """
set -e
cp -a "$0" "$0.before"
mount -t tmpfs -o size=16m tmpfs "$0"
cp -a "$0.before/." "$0"
rm -r "$0.before"
echo $$
cat
"""


@pytest.mark.fault("the disk is full", "one message; once there is space, the run completes")
@pytest.mark.parametrize(
    ("folder", "written", "room"),
    [
        ("artifacts", "output", 500_000),
        (".dvc/cache", "output", 500_000),
        (".rlhf", "checkpoint", 500_000),
        (".", "output", 500_000),
        (".", "output", 0),
    ],
)
def test_the_disk_is_full(project: Project, folder: str, written: str, room: int) -> None:
    """A stage writes 2 MB, and there is not enough room; afterwards output and cache are whole."""
    (project.root / ".rlhf" / f"sft.{written}").write_text("2000000")
    project.edit("params.yaml", "epochs: 1", "epochs: 3")
    lock = project.lock()
    with small_disk(project, folder) as (disk, command):
        run = [sys.executable, "-m", "flows.cli.main", "run"]
        filler = disk / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - room))
        output = command(*run, expect=1)
        assert "no space left on the disk" in output or "disk is full" in output
        root = disk if folder == "." else project.root
        assert (root / "dvc.lock").read_text() == lock
        filler.unlink()
        assert "ran" in command(*run)
        assert "up to date" in command(sys.executable, "-m", "dvc", "status")
        result = (disk if folder == "artifacts" else root / "artifacts") / "sft" / "result"
        content = {path.name: path.read_bytes() for path in result.iterdir()}
        assert len(content.get("more", "")) == (2_000_000 if written == "output" else 0)
        shutil.rmtree(result)
        assert "restored" in command(*run)
        assert {path.name: path.read_bytes() for path in result.iterdir()} == content
