"""The standing services, from `rlhf up` to `rlhf down`: Prefect's server and worker, and MLflow's server.

They keep process ids, logs and Prefect's database in `.rlhf/services`; MLflow's serves the project's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from filelock import FileLock

from flows import processes
from tasks.core.errors import ConfigError, StageError
from tasks.core.paths import project_root, state_dir
from tasks.core.terminal import tail

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

__all__ = [
    "HOST", "TELEMETRY_OFF", "deployment_name", "free_port", "is_healthy", "log_path", "prefect_client",
    "running_services", "start", "stop", "use_services", "wait_until_ready",
]  # fmt: skip

HOST = "127.0.0.1"
START_SECONDS = 180.0
STOP_SECONDS = 45.0  # Prefect gives a run that it cancels 30 s
POLL_SECONDS = 0.1

POOL = "rlhf"  # the work pool of prefect.yaml's deployments; one run at a time

# What a service and all that it starts have in their environment, by which they are found again.
SERVICE_VAR = "RLHF_SERVICE"

# In Prefect's database a slot outlives the server, so its lease must too: without it nobody frees the slot.
LEASES_ON_DISK = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}

TELEMETRY_OFF = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


@dataclass(frozen=True)
class Service:
    """A process that `start` started. `started`: the time of its start, since another process may get the same id."""

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


def start(prefect_port: int, mlflow_port: int, log: Callable[[str], None]) -> dict[str, Service]:
    """Start what is not running yet, and return when all of it answers.

    Raises:
        ConfigError: a port is taken by another program, or the environment names an MLflow server already.
        StageError: a service ended, or did not answer in time.
    """
    from tasks.runtime import mlflow_runs, mlflow_store

    if os.environ.get("MLFLOW_TRACKING_URI", "").startswith("http"):
        raise ConfigError("MLFLOW_TRACKING_URI names an MLflow server; unset it: `rlhf up` starts the project's own")
    with _services_lock():
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(prefect_port)]
        known = running_services().get("prefect")
        prefect = known or _start("prefect", f"http://{HOST}:{prefect_port}/api", prefect_port, command, LEASES_ON_DISK)
        mlflow_runs.connect()  # an experiment made through a server could not be used without it
        command, environment = mlflow_store.server_command(mlflow_port)
        mlflow = running_services().get("mlflow")
        mlflow = mlflow or _start("mlflow", f"http://{HOST}:{mlflow_port}", mlflow_port, command, environment)
        api, store = prefect.address, mlflow.address
        log(f"Prefect {api.removesuffix('/api')} and MLflow {store} are starting …")
        _wait(prefect, lambda: is_healthy(f"{api}/health"))
        clients = {"PREFECT_API_URL": api, "MLFLOW_TRACKING_URI": store}
        _deploy(clients)
        _end_abandoned_runs(api)
        if not known:
            _free_leaked_slots(api)
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--limit", "1"]
        worker = running_services().get("worker") or _start("worker", api, None, command, clients)
        _wait(mlflow, lambda: is_healthy(f"{store}/health"))
        _wait(worker, lambda: _has_worker(api))
        return running_services()


def stop() -> list[str]:
    """End the services and all that they have started, and their runs; return the names of those that were there."""
    from tasks.runtime import mlflow_runs

    with _services_lock():
        ended = []
        services = running_services()
        prefect = services.get("prefect")
        if "worker" in services and prefect:
            _cancel_runs(prefect.address)
        for name in ("worker", "mlflow", "prefect"):  # the worker still reports to the server how its run ended
            if family := _family(name):
                processes.terminate_family(family, STOP_SECONDS)
                ended.append(name)
            if name == "worker":
                mlflow_runs.close_abandoned_runs()
                if prefect:
                    _end_abandoned_runs(prefect.address)
        _write_state({})
        return ended


def _cancel_runs(api: str) -> None:
    """Cancel the worker's runs, so that they record their end; a terminated worker would only kill them."""
    import httpx
    from prefect.states import Cancelling

    from flows import prefect_runs

    deadline = time.monotonic() + STOP_SECONDS
    with contextlib.suppress(httpx.HTTPError), prefect_client(api) as client:
        for run in prefect_runs.active_runs(client, POOL):
            client.set_flow_run_state(run.id, Cancelling())
        while prefect_runs.active_runs(client, POOL) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)


def _end_abandoned_runs(api: str) -> None:
    """End the runs whose process is gone: those with a mark, and the worker's once no process of it is left."""
    import httpx

    from flows import prefect_runs

    with contextlib.suppress(httpx.HTTPError), prefect_client(api) as client:
        prefect_runs.release_abandoned()
        for run in [] if _family("worker") else prefect_runs.active_runs(client, POOL):
            prefect_runs.crash(client, run)


def _free_leaked_slots(api: str) -> None:
    """Free the slots for which a server that has just started has no lease: nobody else would."""
    from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate

    leases = [json.loads(path.read_text()) for path in (_folder() / "prefect" / "concurrency_leases").glob("*-*.json")]
    with prefect_client(api) as client:
        for limit in client.read_global_concurrency_limits():
            held = sum(lease["metadata"]["slots"] for lease in leases if str(limit.id) in lease["resource_ids"])
            if limit.active_slots > held:
                client.update_global_concurrency_limit(limit.name, GlobalConcurrencyLimitUpdate(active_slots=held))


def running_services() -> dict[str, Service]:
    """The services that `start` started and whose first process is still there."""
    try:
        rows = json.loads(_state_file().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    services = [Service(**row) for row in rows]
    return {service.name: service for service in services if service.process()}


def use_services() -> None:
    """Let this process and its children talk to the standing services, where the environment names no others."""
    services = running_services()
    for variable, name in {"PREFECT_API_URL": "prefect", "MLFLOW_TRACKING_URI": "mlflow"}.items():
        if name in services:
            os.environ.setdefault(variable, services[name].address)


def deployment_name(root: Path) -> str:
    """Name of a deployment, unique to this project folder among all that share a Prefect server."""
    place = hashlib.sha256(f"{socket.gethostname()}:{root}".encode()).hexdigest()
    return re.sub(r"[^\w-]", "-", root.name) + "-" + place[:8]


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, **more, **TELEMETRY_OFF, "PATH": path, "PREFECT_HOME": str(_folder() / "prefect")}


def _family(name: str) -> list[psutil.Process]:
    """A service's processes, the oldest first, also where the first is gone, and in sessions of their own."""
    own, everything = _service_id(name), psutil.process_iter(["environ", "create_time"])
    found = [process for process in everything if (process.info["environ"] or {}).get(SERVICE_VAR) == own]
    return sorted(found, key=lambda process: process.info["create_time"])


def _service_id(name: str) -> str:
    return f"{_folder()}:{name}"


def _start(name: str, address: str, port: int | None, command: list[str], variables: Mapping[str, str] = {}) -> Service:
    """Start a service that does not run."""
    if name != "worker":  # a run that a worker has left may end by itself
        processes.terminate_family(_family(name), STOP_SECONDS)
    with socket.socket() as probe:
        if port is not None and probe.connect_ex((HOST, port)) == 0:
            raise ConfigError(
                f"port {port} for {name} is taken by another program; stop that, or choose another: "
                f"`rlhf up --{name}-port {port + 1}`"
            )
    with log_path(name).open("ab") as log:
        process = subprocess.Popen(
            command,
            cwd=project_root(),
            env=_environment({**variables, SERVICE_VAR: _service_id(name)}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            # A shell's background job ignores it, children inherit that, and the worker ends by it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    service = Service(name, address, process.pid, psutil.Process(process.pid).create_time())
    _write_state(running_services() | {name: service})
    return service


def _deploy(variables: Mapping[str, str]) -> None:
    """Make the work pool, the limit of stages on the accelerator at once, and the deployments of prefect.yaml."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    from flows.executor import visible_gpus
    from flows.prefect_runs import DEVICE_LIMIT

    with prefect_client(variables["PREFECT_API_URL"]) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", concurrency_limit=1), overwrite=True)
        try:
            client.read_global_concurrency_limit_by_name(DEVICE_LIMIT)
        except ObjectNotFound:
            client.upsert_global_concurrency_limit_by_name(DEVICE_LIMIT, max(1, len(visible_gpus())))
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    environment = _environment(variables)
    done = subprocess.run(command, cwd=project_root(), env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StageError(f"`prefect deploy --all` failed: {(done.stderr or done.stdout).strip()[-2000:]}")


def _has_worker(api: str) -> bool:
    with prefect_client(api) as client:
        return any(worker.status == "ONLINE" for worker in client.read_workers_for_work_pool(POOL))


@contextmanager
def prefect_client(api: str) -> Iterator[SyncPrefectClient]:
    """A client of the Prefect server at that address."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        yield client


def _wait(service: Service, is_ready: Callable[[], bool]) -> None:
    if not wait_until_ready(is_ready, lambda: service.process() is not None):
        ended = "does not answer" if service.process() else "ended while it started"
        raise StageError(f"{service.name} {ended}: {tail(log_path(service.name))}")


def wait_until_ready(is_ready: Callable[[], bool], is_alive: Callable[[], bool]) -> bool:
    """Wait until a process that starts is ready; False if it ends, or is not ready in time."""
    deadline = time.monotonic() + START_SECONDS
    while not is_ready():
        if not is_alive() or time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def is_healthy(url: str) -> bool:
    """Whether a server answers there."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def free_port() -> int:
    """A port of loopback on which nothing listens."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def _services_lock() -> Iterator[None]:
    _folder().mkdir(parents=True, exist_ok=True)
    with FileLock(_folder() / "lock"):
        yield


def _write_state(services: Mapping[str, Service]) -> None:
    draft = _state_file().with_suffix(".draft")
    draft.write_text(json.dumps([asdict(service) for service in services.values()], indent=2), encoding="utf-8")
    draft.replace(_state_file())


def _folder() -> Path:
    return state_dir() / "services"


def _state_file() -> Path:
    return _folder() / "services.json"


def log_path(name: str) -> Path:
    """The file for what a service prints."""
    return _folder() / f"{name}.log"
