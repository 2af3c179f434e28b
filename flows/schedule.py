"""The pipeline at set times: `rlhf schedule` serves it as a Prefect deployment until it is stopped.

Each run is a process of its own that imports the code anew, so it does what `rlhf run` would do at that moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import httpx
from filelock import FileLock, Timeout
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterNextScheduledStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.flows import Flow
from prefect.runner import Runner
from prefect.schedules import Cron, Schedule
from prefect.settings import PREFECT_API_URL
from rich.markup import escape

from flows.cli import console
from flows.pipeline import pipeline
from flows.services import deployment_name, temporary_server
from tasks.core.errors import ConfigError, RLHFError, StageError
from tasks.core.paths import state as state_folder

__all__ = ["next_fire_times", "scheduled_pipeline", "serve"]

SHOWN_TIMES = 3
POLL_SECONDS = 5

# A run gets 30 s of these from Prefect to report and leave, then it is killed.
STOP_SECONDS = 45

# A run writes Prefect's records to the server and our lines to the terminal; no telemetry.
ENVIRONMENT = {"DO_NOT_TRACK": "1", "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"}


def serve(root: Path, cron: str, timezone: str) -> None:
    """Run the pipeline of this project whenever the cron expression says so, until Ctrl-C or SIGTERM.

    One run at a time: one that falls due while another is going on starts when that has ended.

    Raises:
        ConfigError: the expression or the time zone is wrong, or never comes true.
        StageError: this project is being served already, or the Prefect server does not answer.
    """
    next_fire_times(cron, timezone, count=1)
    _forward_sigint()
    os.environ.update(ENVIRONMENT)
    os.chdir(root)
    try:
        with _exclusive(), temporary_server(scheduler=True) as server:
            if server.address:
                console.print_server_start()
            _shorten_prefect_errors()
            server.wait()
            times = next_fire_times(cron, timezone, count=SHOWN_TIMES)
            console.console.print(f"next runs: {', '.join(format(time, '%Y-%m-%d %H:%M:%S %Z') for time in times)}")
            asyncio.run(_serve(deployment_name(root), Cron(cron, timezone=timezone)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        pass
    except httpx.HTTPError as error:
        raise StageError(f"the Prefect server at {PREFECT_API_URL.value()} does not answer: {error}") from error
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    console.console.print("stopped: nothing more will run")


def next_fire_times(cron: str, timezone: str, *, count: int) -> list[datetime]:
    """The next times at which Prefect's scheduler will start a run.

    Raises:
        ConfigError: the expression or the time zone is wrong, or never comes true.
    """
    from prefect.server.schemas.schedules import CronSchedule

    try:
        ZoneInfo(timezone)
    except (ValueError, OSError, KeyError) as error:
        raise ConfigError(f"no time zone {timezone!r}; write it like Europe/Vienna or UTC") from error
    try:
        return list(asyncio.run(CronSchedule(cron=cron, timezone=timezone).get_dates(count)))
    except ValueError as error:
        raise ConfigError(
            f"cron expression {cron!r} is wrong or never comes true; write minute, hour, day, month and weekday: "
            "'0 2 * * *' is 2 o'clock every night"
        ) from error


async def _serve(name: str, schedule: Schedule) -> None:
    runner = _Runner(name=name, limit=1, query_seconds=POLL_SECONDS, prefetch_seconds=0)
    deployment = await scheduled_pipeline.ato_deployment(name, schedule=schedule)
    deployment.entrypoint = f"{__name__}.scheduled_pipeline"
    await _delete_missed_runs(await runner.aadd_deployment(deployment))
    console.console.print(f"serving deployment {scheduled_pipeline.name}/{name}; stop it with Ctrl-C")
    try:
        await runner.start()
    finally:
        await runner.cancel_all()


async def _delete_missed_runs(deployment: UUID) -> None:
    """Prefect keeps runs that fell due while nobody served them, and would start them all now."""
    missed = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[deployment]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
        next_scheduled_start_time=FlowRunFilterNextScheduledStartTime.model_validate({"before_": datetime.now(UTC)}),
    )
    async with get_client() as client:
        for run in await client.read_flow_runs(flow_run_filter=missed):
            if run.auto_scheduled:
                await client.delete_flow_run(run.id)


class _Runner(Runner):
    """Prefect's own does not always end the run that it has started: not at SIGTERM, not when its server is gone."""

    def handle_sigterm(self, *_: Any, **__: Any) -> None:
        console.console.print("stopping …")
        self.execute_in_background(self._stop_all)

    async def cancel_all(self) -> None:
        await super().cancel_all()
        for run in self._process_manager.flow_run_ids():  # the server could not be asked
            await self._process_manager.kill(run)

    async def _stop_all(self) -> None:
        while not self.started:
            await asyncio.sleep(0.1)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await self.astop()
                while True:  # until the loop ends: a run may just have been starting
                    await asyncio.sleep(1)
                    await self.cancel_all()
        for task in asyncio.all_tasks():  # they wait for a server that is gone
            task.cancel()


def _on_running(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    console.console.print(f"[bold]{datetime.now():%Y-%m-%d %H:%M:%S}[/] scheduled run {escape(flow_run.name)}")


def _on_failure(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    error = state.result(raise_on_failure=False)
    if isinstance(error, RLHFError):
        console.print_error(error)
    else:
        traceback.print_exception(error)


# What a deployment of `rlhf schedule` runs: the pipeline, and what only a terminal needs.
scheduled_pipeline = pipeline.with_options(on_running=[_on_running], on_failure=[_on_failure])


@contextmanager
def _exclusive() -> Iterator[None]:
    folder = state_folder()
    folder.mkdir(exist_ok=True)
    try:
        with FileLock(folder / "schedule.lock", timeout=0):
            yield
    except Timeout as error:
        raise StageError("another `rlhf schedule` serves this project; stop that one first") from error


def _forward_sigint() -> None:
    """Make Ctrl-C a SIGTERM to this process alone.

    A terminal sends Ctrl-C to every process of the group; blocked here, it stays blocked in the runs that are started
    from here, which then end because the runner says so, and report what became of them.
    """

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    def forward() -> None:
        signal.sigwait({signal.SIGINT})
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    threading.Thread(target=forward, daemon=True).start()


def _shorten_prefect_errors() -> None:
    """In this process, what goes wrong with the server or with starting a run is still to be seen, each in a line."""

    def shorten(record: logging.LogRecord) -> bool:
        record.exc_info = None
        return True

    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.WARNING)
        handler.addFilter(shorten)
