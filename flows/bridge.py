"""One DVC stage as one Prefect task: DVC decides whether it runs, Prefect shows what became of it and why."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from http import HTTPStatus

from httpx import HTTPStatusError
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, StateDetails
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.states import Completed

from flows import screen
from flows.children import bring_up_to_date_in_child, log_of
from flows.services import DEVICE_LIMIT
from flows.work import Outcome, bring_up_to_date
from tasks.runtime import versioning

__all__ = ["stage"]

# How long Prefect's server keeps the device for a run that no longer reports, because it was killed.
LEASE_SECONDS = 60
PREFECT_INTERNALS = "prefect._internal.concurrency"


@task(cache_policy=NO_CACHE)
def stage(
    name: str,
    *,
    force: bool = False,
    pull: bool = False,
    ranks: int = 1,
    own_process: bool = False,
    device: str | None = None,
    timeout: float | None = None,
) -> State[Outcome]:
    """Bring a stage up to date; the state is `Cached` where nothing had to be computed.

    Args:
        name: the stage in dvc.yaml.
        force: run it even if nothing changed.
        pull: fetch missing results from the DVC remote before running.
        ranks: how many processes share the work, if the stage's work can be shared.
        own_process: run it in a child process, so that others can run beside it.
        device: the GPU that the child sees.
        timeout: seconds after which the child is ended.

    Raises:
        RLHFError: whatever the stage or DVC finds wrong; dvc.lock is left alone.
    """
    in_child = partial(bring_up_to_date_in_child, device=device, timeout=timeout)
    bring = in_child if own_process else bring_up_to_date
    with ExitStack() as held:

        def begins(reasons: Sequence[str]) -> None:
            if versioning.needs_device(name):
                _take_device(held)
            screen.stage_begins(name, reasons, log_of(name) if own_process else None)

        outcome = bring(name, force=force, pull=pull, ranks=ranks, on_begin=begins, on_wait=screen.stage_waits)
    screen.stage_ends(name, outcome.result, outcome.seconds, outcome.reasons)
    details = StateDetails(cache_key=outcome.key)
    if outcome.result == "executed":
        return Completed(message=f"Ran: {outcome.why}", data=outcome, state_details=details)
    word = "Unchanged" if outcome.result == "unchanged" else "Restored from the run-cache"
    return Completed(name="Cached", message=f"{word}: {outcome.why}", data=outcome, state_details=details)


def _take_device(held: ExitStack) -> None:
    """Hold a slot of Prefect's limit of stages that compute at once on this machine, if its server has that limit."""
    slot = partial(concurrency, DEVICE_LIMIT, lease_duration=LEASE_SECONDS, raise_on_lease_renewal_failure=False)
    logging.getLogger(PREFECT_INTERNALS).addFilter(_not_of_a_slot)
    try:
        held.enter_context(slot(max_retries=0))
    except ConcurrencySlotAcquisitionError as error:
        if not _is_taken(error):
            raise
        screen.device_waits()
        held.enter_context(slot())


def _is_taken(error: ConcurrencySlotAcquisitionError) -> bool:
    """Whether Prefect's server said that another run holds the slot, rather than that it could not say."""
    answer = error.__cause__
    return isinstance(answer, HTTPStatusError) and answer.response.status_code == HTTPStatus.LOCKED


def _not_of_a_slot(record: logging.LogRecord) -> bool:
    """Whether a line of Prefect's log tells of anything but a slot that it could not get: `slot` raises that itself."""
    return "ConcurrencySlotAcquisition" not in record.getMessage()
