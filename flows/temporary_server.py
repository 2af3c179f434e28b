"""A Prefect server for one run, where no other is configured."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flows import processes
from flows.services import HOST, TELEMETRY_OFF, free_port, is_healthy, wait_until_ready
from tasks.core.errors import StageError
from tasks.core.paths import state_dir
from tasks.core.terminal import tail

__all__ = ["temporary_server"]

# It has no need of what these switch off.
TEMPORARY = TELEMETRY_OFF | {"PREFECT_API_BLOCKS_REGISTER_ON_START": "false", "PREFECT_UI_ENABLED": "false"}
TEMPORARY |= {"PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL"}

# For the process that runs the flow: a server that is gone is not waited for, and what Prefect says of that is hidden.
CLIENT = {"DO_NOT_TRACK": "1", "PREFECT_CLIENT_MAX_RETRIES": "1", "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL"}


def _check_standing_server() -> None:
    from prefect.settings import PREFECT_API_URL

    address = PREFECT_API_URL.value()
    try:
        urllib.request.urlopen(f"{address}/health", timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answers, if only that it wants a key
    except (OSError, ValueError) as error:
        raise StageError(
            f"the Prefect server at {address} does not answer ({error}): start it, or unset PREFECT_API_URL (or choose "
            "another Prefect profile) for a temporary one"
        ) from error


@contextmanager
def temporary_server() -> Iterator[tuple[str | None, Callable[[], None]]]:
    """Start a server unless PREFECT_API_URL or Prefect's profile names one, and make this process use it.

    Yields its address, None for a standing server, and what waits until it answers, or raises a StageError.

    Prefect's own begins late, dies of the same Ctrl-C as the flow before the flow can report to it, and stays behind if
    the flow is killed. This one starts while other libraries are imported, and always ends with this process.
    """
    os.environ.update(CLIENT | os.environ)
    from prefect.settings import PREFECT_API_URL, temporary_settings

    if PREFECT_API_URL.value():
        yield None, _check_standing_server
        return
    port = free_port()
    address = f"http://{HOST}:{port}/api"
    _log_path().parent.mkdir(parents=True, exist_ok=True)
    with _log_path().open("wb") as log:
        process = processes.spawn(["-m", "flows.temporary_server", str(port)], output=log)

    def wait() -> None:
        if not wait_until_ready(lambda: is_healthy(f"{address}/health"), lambda: process.poll() is None):
            raise StageError(
                "the temporary Prefect server did not start; set PREFECT_API_URL to a server that runs, or "
                + tail(_log_path())
            )

    assert process.stdin
    # Registered before Prefect's own exit handlers, so called after them: they still send logs and events.
    atexit.register(process.stdin.close)
    with temporary_settings({PREFECT_API_URL: address}):
        yield address, wait


def _log_path() -> Path:
    return state_dir() / "logs" / "prefect.log"


def _serve(port: int) -> None:
    """Serve Prefect's API on loopback until the parent is gone."""
    os.environ.update(TEMPORARY | os.environ)
    import uvicorn
    from prefect.server.api.server import create_app

    processes.die_with_parent()
    app = create_app(ephemeral=True, final=True)
    config = uvicorn.Config(app, host=HOST, port=port, log_level="critical", lifespan="on")
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
