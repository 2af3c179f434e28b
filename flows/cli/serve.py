"""The command `rlhf serve`: a registered policy behind OpenAI's protocol."""

import asyncio
import os
from typing import Annotated

import typer

from flows.cli.console import console, enter_project_with_services, handle_interrupt
from flows.cli.labels import listen
from tasks.core.errors import ConfigError, StageError
from tasks.core.paths import state_dir

__all__ = ["app"]

app = typer.Typer()

DRAIN_SECONDS = 60
EXPOSED_WARNING = "Others can reach this server, and keys travel in the clear: put a proxy with TLS before it."


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="A version's number, champion, or challenger.")] = "champion",
    host: Annotated[
        str, typer.Option(help="Where to listen; anywhere but on 127.0.0.1 clients need keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8100,
    canary: Annotated[str, typer.Option(help="challenger=0.1: so many of the users get that version.")] = "",
    content: Annotated[bool, typer.Option(help="Record prompts and answers, or only that there were some.")] = True,
    sample: Annotated[float, typer.Option(min=0, max=1, help="Share of the answers that are recorded.")] = 1.0,
    refresh: Annotated[float, typer.Option(min=0.1, help="Seconds until a moved alias is looked up again.")] = 10.0,
    add_key: Annotated[str, typer.Option(help="Make a key of this name for a client, print it once, and end.")] = "",
    rate: Annotated[int, typer.Option(min=1, help="Requests a minute with one key.")] = 60,
) -> None:
    """Serve a registered policy until Ctrl-C: completions, chat and feedback; a new champion takes over by itself."""
    enter_project_with_services()
    from tasks.serving.access import Access

    access = Access(state_dir() / "serving" / "access.json", rate)
    if add_key:
        console.print(f"key of {add_key}: {access.add(add_key)}", markup=False)
        return
    import uvicorn

    from tasks.runtime import mlflow_store
    from tasks.serving.app import LOOPBACK, Recording, create_app
    from tasks.serving.journal import Journal
    from tasks.serving.versions import Versions

    exposed = host not in LOOPBACK
    if exposed and not access.names:
        raise ConfigError(f"whoever reaches {host} could ask: make a key first (`rlhf serve --add-key NAME`)")
    listener = listen(host, port)
    _, experiment = mlflow_store.open_store()
    os.environ[mlflow_store.EXPERIMENT_ID_VAR] = experiment  # MLflow may be away later
    versions = Versions(model, _parse_canary(canary))
    with handle_interrupt("nothing was lost"):
        asyncio.run(versions.refresh())
    if versions.problems:
        raise StageError("; ".join(versions.problems.values()))
    server = create_app(versions, Journal(), access, Recording(sample, content), keys=exposed, refresh_seconds=refresh)
    served = ", ".join(f"{name}: version {item.number}" for name, item in versions.served.items())
    console.print(f"http://{host}:{listener.getsockname()[1]}/v1   {served}   (Ctrl-C ends it)")
    if exposed:
        console.print(f"[yellow]{EXPOSED_WARNING}[/]")
    config = uvicorn.Config(server, log_level="warning", timeout_graceful_shutdown=DRAIN_SECONDS)
    with handle_interrupt("what was acknowledged is stored"):
        uvicorn.Server(config).run(sockets=[listener])


def _parse_canary(text: str) -> tuple[str, float] | None:
    name, _, share = text.partition("=")
    try:
        if not text:
            return None
        if name and 0 <= float(share) <= 1:
            return name, float(share)
    except ValueError:
        pass
    raise ConfigError(f"--canary {text!r}: write a version and a share of the users, challenger=0.1")
