"""What happens outside of a run and should start one."""

from __future__ import annotations

import os

import httpx
from prefect.client.orchestration import get_client
from prefect.events.schemas.events import Event, Resource

from flows.schedule import deployment_name
from tasks.core.errors import StageError
from tasks.core.paths import project_root

__all__ = ["announce_data"]

DATA_EVENT = "rlhf.data"
"""New data or feedback; prefect.yaml's trigger of the deployment `retrain` expects it."""


def announce_data(md5: str) -> None:
    """Emit the event that starts the retrain deployment with this md5 as parameter.

    Sent here and now and not by Prefect's `emit_event`, which does so later and says nothing where it fails.

    Raises:
        StageError: no Prefect server is configured, or it does not answer.
    """
    if not os.environ.get("PREFECT_API_URL"):
        raise StageError("no Prefect server that could start a run: `rlhf up`, or set PREFECT_API_URL to yours")
    resource = Resource({"prefect.resource.id": f"rlhf.data.{deployment_name(project_root())}"})
    event = Event(event=DATA_EVENT, resource=resource, payload={"md5": md5})
    try:
        with get_client(sync_client=True) as client:
            client.request("POST", "/events", json=[event.model_dump(mode="json")])
    except httpx.HTTPError as error:
        raise StageError(f"the Prefect server at {os.environ['PREFECT_API_URL']} does not answer: {error}") from error
