"""`rlhf schedule`: the nightly deployment at other times, by the services that are up or by some of its own."""

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable
from datetime import datetime
from zoneinfo import ZoneInfo

import httpx
from prefect.client.schemas.schedules import SCHEDULE_TYPES, CronSchedule
from prefect.exceptions import ObjectNotFound

from flows import services
from tasks.core.errors import ConfigError, StageError

__all__ = ["next_fire_times", "serve"]

DEPLOYMENT = "rlhf/nightly"
SHOWN_TIMES = 3
POLL_SECONDS = 1.0


def serve(cron: str, timezone: str, log: Callable[[str], None]) -> None:
    """Run the pipeline of this project whenever the cron expression says so, until Ctrl-C or SIGTERM.

    One run at a time: one that falls due while another is going on starts when that has ended. Services that are up
    are used, and stay up with the schedule that they had.

    Raises:
        ConfigError: the expression or the time zone is wrong, or never comes true.
        StageError: one of the services ended.
    """
    next_fire_times(cron, timezone, count=1)
    are_up = bool(services.running_services())
    before: list[tuple[SCHEDULE_TYPES, bool]] | None = None
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        running = services.start(services.free_port(), services.free_port(), log)
        before = _set_schedule(running["prefect"].address, [(CronSchedule(cron=cron, timezone=timezone), True)])
        times = next_fire_times(cron, timezone, count=SHOWN_TIMES)
        log(f"next runs: {', '.join(format(time, '%Y-%m-%d %H:%M:%S %Z') for time in times)}")
        log(f"their output: {services.log_path('worker')}; stop with Ctrl-C")
        while len(services.running_services()) == len(running):
            time.sleep(POLL_SECONDS)
        raise StageError(f"a service has ended; its log is in {services.log_path('worker').parent}")
    except KeyboardInterrupt:
        log("stopping …")
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # The next `rlhf up` must find neither this schedule nor runs that it has planned.
        prefect = services.running_services().get("prefect")
        if prefect and before is not None:
            with contextlib.suppress(httpx.HTTPError, ObjectNotFound):
                _set_schedule(prefect.address, before if are_up else [])
        if not are_up:
            services.stop()
    log("stopped: the services have the schedule of before" if are_up else "stopped: nothing more will run")


def next_fire_times(cron: str, timezone: str, *, count: int) -> list[datetime]:
    """The next times at which Prefect will start a run; a ConfigError if there are none, or an argument is wrong."""
    from prefect.server.schemas import schedules  # with get_dates, which the client's has not

    try:
        ZoneInfo(timezone)
    except (ValueError, OSError, KeyError) as error:
        raise ConfigError(f"no time zone {timezone!r}; write it like Europe/Vienna or UTC") from error
    try:
        return list(asyncio.run(schedules.CronSchedule(cron=cron, timezone=timezone).get_dates(count)))
    except ValueError as error:
        raise ConfigError(
            f"cron expression {cron!r} is wrong or never comes true; write minute, hour, day, month and weekday: "
            "'0 2 * * *' is 2 o'clock every night"
        ) from error


def _set_schedule(api: str, schedules: list[tuple[SCHEDULE_TYPES, bool]]) -> list[tuple[SCHEDULE_TYPES, bool]]:
    """Replace the deployment's schedules; return those that it had, each with whether it is active."""
    with services.prefect_client(api) as client:
        deployment = client.read_deployment_by_name(DEPLOYMENT)
        before = client.read_deployment_schedules(deployment.id)
        for old in before:
            client.delete_deployment_schedule(deployment.id, old.id)
        if schedules:
            client.create_deployment_schedules(deployment.id, schedules)
    return [(old.schedule, old.active) for old in before]
