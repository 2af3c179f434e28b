"""A temporary Prefect server for one run, where no standing one is configured.

Prefect can start one itself, but then it begins late, dies of the same Ctrl-C as the flow before the flow can report
to it, and stays behind if the flow is killed. This one starts while other libraries are imported, in a session of its
own, and ends when the pipe to its parent closes, however that came about.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from tasks.core.errors import StageError

__all__ = ["TemporaryServer", "answers", "temporary_server"]

STARTUP_SECONDS = 120.0
SHUTDOWN_SECONDS = 20.0

# What only a standing server needs.
ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_UI_ENABLED": "false",
}


class TemporaryServer:
    """The server process; `address` is None where a standing server is configured instead."""

    def __init__(self, address: str | None, process: subprocess.Popen[bytes] | None) -> None:
        self.address, self._process = address, process

    def wait(self) -> None:
        """Return as soon as the server answers.

        Raises:
            StageError: it ended, or did not answer in time.
        """
        if self.address is None or self._process is None:
            return
        deadline = time.monotonic() + STARTUP_SECONDS
        while not answers(f"{self.address}/health"):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise StageError(
                    "the temporary Prefect server did not start; run `prefect server start` in another terminal to see "
                    "why, or set PREFECT_API_URL to a server that runs"
                )
            time.sleep(0.1)


@contextmanager
def temporary_server(*, scheduler: bool = False) -> Iterator[TemporaryServer]:
    """Start a server unless PREFECT_API_URL or Prefect's profile names one, and make this process use it.

    Args:
        scheduler: it also starts the runs of scheduled deployments; otherwise it only records.
    """
    os.environ.setdefault("DO_NOT_TRACK", "1")
    from prefect.settings import PREFECT_API_URL, temporary_settings

    if PREFECT_API_URL.value():
        yield TemporaryServer(None, None)
        return
    port = _free_port()
    address = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-m", "flows.server", str(port), *(["scheduler"] if scheduler else [])]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert process.stdin
    # Registered before Prefect's own exit handlers, so called after them: they still send logs and events. Nobody waits
    # for the server to end: it writes what it has received, and leaves.
    atexit.register(process.stdin.close)
    with temporary_settings({PREFECT_API_URL: address}):
        yield TemporaryServer(address, process)


def serve(port: int, *, scheduler: bool = False) -> None:
    """Serve Prefect's API on loopback until standard input closes."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    import uvicorn
    from prefect.server.api.server import create_app

    # Prefect's scheduler does not run in what it calls an ephemeral server.
    app = create_app(ephemeral=not scheduler, final=True)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="critical", lifespan="on"))
    threading.Thread(target=_stop_with_parent, args=[server], daemon=True).start()
    server.run()


def _stop_with_parent(server: object) -> None:
    sys.stdin.buffer.read()
    setattr(server, "should_exit", True)  # noqa: B010
    time.sleep(SHUTDOWN_SECONDS)
    os._exit(1)  # a service of Prefect's that waits for the network must not keep the server alive


def answers(url: str) -> bool:
    """Whether a server says that it is well."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    serve(int(sys.argv[1]), scheduler="scheduler" in sys.argv[2:])
