"""Standing services on loopback: Prefect's server and its worker, and MLflow's server, from `rlhf up` to `rlhf down`.

What they keep lies in one folder, `.rlhf/services`: their process ids, logs and Prefect's database. MLflow serves the
project's own store, so runs made with and without the server stand side by side.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from filelock import FileLock

from flows import screen
from flows.devices import gpus
from flows.server import answers
from tasks.core.errors import ConfigError, StageError
from tasks.core.paths import project_root, state
from tasks.runtime import mlflow_store, recording

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

__all__ = ["DEVICE_LIMIT", "POOL", "Service", "down", "running", "up", "use"]

HOST = "127.0.0.1"
START_SECONDS = 180.0
STOP_SECONDS = 45.0  # Prefect gives a run that it cancels 30 s
POLL_SECONDS = 0.2

POOL = "rlhf"
"""The work pool of prefect.yaml's deployments; one run at a time."""

DEVICE_LIMIT = "device"
"""Prefect's global concurrency limit that a stage holds while it computes on the accelerator."""

QUIET = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


@dataclass(frozen=True)
class Service:
    """A process that `up` started. `started`: the time of its start, since another process may get the same id."""

    name: str
    address: str
    pid: int
    started: float

    def process(self) -> psutil.Process | None:
        """The process, if it is still this one."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 1
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


def up(prefect_port: int, mlflow_port: int, tell: Callable[[str], None]) -> dict[str, Service]:
    """Start what is not running yet, and return when all of it answers.

    Raises:
        ConfigError: a port is taken by another program, or the environment names an MLflow server already.
        StageError: a service ended, or did not answer in time.
    """
    if os.environ.get("MLFLOW_TRACKING_URI", "").startswith("http"):
        raise ConfigError("MLFLOW_TRACKING_URI names an MLflow server; unset it: `rlhf up` starts the project's own")
    with _alone():
        api = f"http://{HOST}:{prefect_port}/api"
        _start("prefect", api, prefect_port, _prefect_command(prefect_port), _environment())
        if "mlflow" not in running():
            recording.prepare()  # an experiment made through a server could not be used without it
        command, environment = mlflow_store.server_command(mlflow_port)
        _start("mlflow", f"http://{HOST}:{mlflow_port}", mlflow_port, command, environment | _environment())
        services = running()
        api, store = services["prefect"].address, services["mlflow"].address
        tell(f"Prefect {api.removesuffix('/api')} and MLflow {store} are starting …")
        _wait(services["prefect"], lambda: answers(f"{api}/health"))
        clients = _environment() | {"PREFECT_API_URL": api, "MLFLOW_TRACKING_URI": store}
        _deploy(clients)
        _start("worker", api, None, _worker_command(), clients)
        _wait(services["mlflow"], lambda: answers(f"{store}/health"))
        worker = running().get("worker")
        if worker is None:
            raise StageError(f"the worker ended while it started: {_said('worker')}")
        _wait(worker, lambda: _has_worker(api))
        return running()


def down() -> list[str]:
    """End the services and whatever runs they started, by their process ids; the names of those that were running.

    A run that is going on keeps its checkpoint, and the next run goes on from it.
    """
    with _alone():
        ended = []
        services = running()
        for name in ("worker", "mlflow", "prefect"):  # the worker still tells the server what becomes of its run
            if service := services.get(name):
                _end(service)
                ended.append(name)
        _record({})
        return ended


def running() -> dict[str, Service]:
    """The services that `up` started and that are still there."""
    try:
        rows = json.loads(_file().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    services = [Service(**row) for row in rows]
    return {service.name: service for service in services if service.process()}


def use() -> None:
    """Let this process and its children talk to the standing services, where the environment names no others."""
    services = running()
    for variable, name in {"PREFECT_API_URL": "prefect", "MLFLOW_TRACKING_URI": "mlflow"}.items():
        if name in services:
            os.environ.setdefault(variable, services[name].address)


def _prefect_command(port: int) -> list[str]:
    return [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]


def _worker_command() -> list[str]:
    return [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--limit", "1"]


def _environment() -> dict[str, str]:
    folder = Path(sys.executable).parent
    path = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, **QUIET, "PATH": path, "PREFECT_HOME": str(_folder() / "prefect")}


def _start(name: str, address: str, port: int | None, command: list[str], environment: Mapping[str, str]) -> None:
    services = running()
    if name in services:
        return
    if port is not None and _taken(port):
        raise ConfigError(
            f"port {port} for {name} is taken by another program; stop that, or choose another: "
            f"`rlhf up --{name}-port {port + 1}`"
        )
    with _log(name).open("ab") as log:
        process = subprocess.Popen(
            command,
            cwd=project_root(),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            # A shell's background job ignores it, children inherit that, and the worker ends by it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    services[name] = Service(name, address, process.pid, psutil.Process(process.pid).create_time())
    _record(services)


def _deploy(environment: Mapping[str, str]) -> None:
    """The work pool, the limit of stages on the accelerator at once, and the deployments of prefect.yaml."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    with _client(environment["PREFECT_API_URL"]) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", concurrency_limit=1), overwrite=True)
        try:
            client.read_global_concurrency_limit_by_name(DEVICE_LIMIT)
        except ObjectNotFound:
            client.upsert_global_concurrency_limit_by_name(DEVICE_LIMIT, max(1, len(gpus())))
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(
        command, cwd=project_root(), env=dict(environment), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise StageError(f"`prefect deploy --all` failed: {(done.stderr or done.stdout).strip()[-2000:]}")


def _has_worker(api: str) -> bool:
    with _client(api) as client:
        return any(worker.status == "ONLINE" for worker in client.read_workers_for_work_pool(POOL))


@contextmanager
def _client(api: str) -> Iterator[SyncPrefectClient]:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        yield client


def _wait(service: Service, is_ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not is_ready():
        if service.process() is None:
            raise StageError(f"{service.name} ended while it started: {_said(service.name)}")
        if time.monotonic() > deadline:
            raise StageError(f"{service.name} does not answer after {START_SECONDS:.0f} s: {_said(service.name)}")
        time.sleep(POLL_SECONDS)


def _end(service: Service) -> None:
    """Ask the process to end, then everything that it had started, then kill what is left."""
    process = service.process()
    if process is None:
        return
    family = [process, *process.children(recursive=True)]
    _ask([process])
    _, left = psutil.wait_procs(family, STOP_SECONDS)
    _ask(left)
    _, left = psutil.wait_procs(left, STOP_SECONDS)
    for member in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(left, STOP_SECONDS)


def _ask(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


@contextmanager
def _alone() -> Iterator[None]:
    _folder().mkdir(parents=True, exist_ok=True)
    with FileLock(_folder() / "lock"):
        yield


def _record(services: Mapping[str, Service]) -> None:
    text = json.dumps([asdict(service) for service in services.values()], indent=2)
    draft = _file().with_suffix(".draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(_file())


def _folder() -> Path:
    return state() / "services"


def _file() -> Path:
    return _folder() / "services.json"


def _log(name: str) -> Path:
    return _folder() / f"{name}.log"


def _said(name: str) -> str:
    return screen.tail(_log(name))
