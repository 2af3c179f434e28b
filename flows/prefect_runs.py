"""What processes of this project hold on a Prefect server: flow runs, and slots of the device.

A server that goes away ends no run, and what a killed process held is freed by the next command.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from flows.cli import console
from tasks.core.errors import RLHFError, StageError
from tasks.runtime import holding

__all__ = [
    "DEVICE_LIMIT", "active_runs", "crash", "device_slot", "hold_flow_run", "release_abandoned", "reporting",
    "server_may_leave",
]  # fmt: skip

DEVICE_LIMIT = "device"
"""Prefect's global concurrency limit that a stage holds while it computes on the accelerator."""

# How long Prefect's server keeps the device for a process that no longer reports; its minimum.
LEASE_SECONDS = 60.0
RENEW_SECONDS = 15.0
POLL_SECONDS = 1.0

FLOW_MARK, SLOT_MARK = "flow", "slot"  # kinds of marks, see `tasks.runtime.holding`

ACTIVE = ("PENDING", "RUNNING", "PAUSED", "CANCELLING")


_flow_marks = contextlib.ExitStack()


def hold_flow_run(flow_run_id: str) -> None:
    """Mark a flow run as one of this process until the process ends: Prefect reports its end after its function's.

    Whoever finds that the process has ended removes the mark.
    """
    _flow_marks.enter_context(holding.hold(FLOW_MARK, flow_run_id))


@contextmanager
def device_slot(on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a slot of Prefect's limit of stages that compute at once, if its server answers and has that limit.

    Prefect's own `concurrency` waits in a thread that keeps the interpreter from ending.

    Args:
        on_wait: called once if the slots are taken.
    """
    lease = None
    with reporting():
        lease = _acquire_slot(on_wait)
    if lease is None:
        yield
        return
    ended = threading.Event()
    context = contextvars.copy_context()  # it knows the server's address
    threading.Thread(target=context.run, args=[_renew_lease, lease, ended], daemon=True).start()
    with holding.hold(SLOT_MARK, str(lease)):
        try:
            yield
        finally:
            ended.set()
            with reporting():
                _release_slot(lease)


def _acquire_slot(on_wait: Callable[[], None]) -> UUID | None:
    """The lease of a slot; None where there is no such limit."""
    waiting = False
    while (answer := _try_slot()) is None:
        if not waiting:
            on_wait()
        waiting = True
        _release_abandoned_slots()
        time.sleep(POLL_SECONDS)
    return UUID(answer["lease_id"]) if answer["limits"] else None


def _try_slot() -> dict[str, Any] | None:
    """The server's answer; None where all slots are taken."""
    try:
        with _client() as client:
            answer = client.increment_concurrency_slots_with_lease([DEVICE_LIMIT], 1, "concurrency", LEASE_SECONDS)
            return dict(answer.json())
    except httpx.HTTPStatusError as error:
        if error.response.status_code != HTTPStatus.LOCKED:
            raise
        return None


def _renew_lease(lease: UUID, ended: threading.Event) -> None:
    while not ended.wait(RENEW_SECONDS):
        with contextlib.suppress(httpx.HTTPError), _client() as client:
            client.renew_concurrency_lease(lease, LEASE_SECONDS)


def _release_slot(lease: UUID) -> None:
    with contextlib.suppress(httpx.HTTPStatusError), _client() as client:  # which says that it has ended by itself
        client.release_concurrency_slots_with_lease(lease)
    holding.forget(SLOT_MARK, str(lease))


def _release_abandoned_slots() -> None:
    for lease in holding.abandoned(SLOT_MARK):
        _release_slot(UUID(lease))


def _client() -> SyncPrefectClient:
    """A client for a moment: one that has been answered once would try for a minute where the server is away."""
    return get_client(sync_client=True)


def release_abandoned() -> None:
    """Free the slots and end the flow runs whose process is gone, as far as this server knows them."""
    _release_abandoned_slots()
    with _client() as client:
        for flow_run_id in holding.abandoned(FLOW_MARK):
            with contextlib.suppress(ObjectNotFound):  # another server may know it
                crash(client, client.read_flow_run(UUID(flow_run_id)))
                holding.forget(FLOW_MARK, flow_run_id)


def crash(client: SyncPrefectClient, run: FlowRun) -> None:
    """Let a flow run and its task runs whose process is gone end as crashed."""
    state: State[None] = Crashed(message="Its process ended without a word.")
    tasks = client.read_task_runs(flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [run.id]}}))
    for task in tasks:
        if task.state is not None and not task.state.is_final():
            client.set_task_run_state(task.id, state, force=True)
    if run.state is not None and not run.state.is_final():
        client.set_flow_run_state(run.id, state, force=True)


def active_runs(client: SyncPrefectClient, pool: str) -> list[FlowRun]:
    """A work pool's flow runs that some process should be working on."""
    active = FlowRunFilter.model_validate({"state": {"type": {"any_": ACTIVE}}})
    return client.read_flow_runs(
        flow_run_filter=active, work_pool_filter=WorkPoolFilter.model_validate({"name": {"any_": [pool]}})
    )


# -- a server that goes away -----------------------------------------------------------------------------------


@contextmanager
def reporting() -> Iterator[None]:
    """Tell Prefect's server something that the run can do without: where it does not answer, say so once and go on."""
    try:
        yield
    except httpx.TransportError:
        console.print_prefect_away()


@contextmanager
def server_may_leave() -> Iterator[None]:
    """Let what ended the work be the error, not that Prefect could not report it; a StageError where it was needed."""
    try:
        yield
    except httpx.TransportError as error:
        cause = error.__context__
        while cause is not None:
            if isinstance(cause, RLHFError | KeyboardInterrupt):
                raise cause from None
            cause = cause.__context__
        raise StageError(
            f"Prefect's server went away ({error}): run again, and what was computed is restored; without "
            "PREFECT_API_URL a temporary server is used"
        ) from error
