"""The commands for human preferences: the labelling page, and who may label."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from flows.cli import console as screen
from flows.cli.console import enter_project as enter
from tasks.core.errors import ConfigError
from tasks.core.paths import state

if TYPE_CHECKING:
    from tasks.labelling.store import LabelStore

__all__ = ["Database", "commands"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
STOP_SECONDS = 5

NO_ITEMS = "none yet: `rlhf label ask` chooses pairs to compare"
NO_LABELLERS = "none yet: `rlhf label add NAME` adds one, and prints a password"
EXPOSED = "Others can reach this page, and passwords travel in the clear: put a proxy with TLS before it."

commands = typer.Typer(help="Let people compare responses, on a page of their own; Ctrl-C ends it.")

Database = Annotated[
    str | None,
    typer.Option(
        envvar="RLHF_LABEL_DATABASE", help="URL of a PostgreSQL database; default: SQLite in .rlhf/labels.db."
    ),
]
Host = Annotated[str, typer.Option(help="Where to listen; 0.0.0.0: everywhere, so that others reach the page.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")]


@commands.callback(invoke_without_command=True)
def serve(context: typer.Context, host: Host = "127.0.0.1", port: Port = 8800, database: Database = None) -> None:
    """Serve the labelling page until Ctrl-C."""
    if context.invoked_subcommand:
        return
    enter()
    import uvicorn

    from tasks.labelling import sessions
    from tasks.labelling.app import application
    from tasks.labelling.database import database_url
    from tasks.labelling.store import LabelStore

    listener = _listen(host, port)
    store = LabelStore(database_url(database))
    state().mkdir(exist_ok=True)
    app = application(store, sessions.secret(state() / "label-secret"))
    _announce(store, host, listener.getsockname()[1])
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=STOP_SECONDS)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
    screen.console.print("ended; every answer that the page said was saved is in the database")


@commands.command()
def add(name: Annotated[str, typer.Argument(help="Who labels.")], database: Database = None) -> None:
    """Add a labeller, or give a known one a new password; it is printed once, and only its hash is kept."""
    enter()
    from tasks.labelling.database import database_url
    from tasks.labelling.passwords import hashed, new_password
    from tasks.labelling.store import LabelStore

    store, password = LabelStore(database_url(database)), new_password()
    is_new = store.add_labeller(name, hashed(password))
    store.close()
    what = "can sign in" if is_new else "was known, and has a new password; the old one and its sessions have ended"
    screen.console.print(f"{escape(name)} {what}")
    screen.console.print(f"password: {password}", highlight=False)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port") from None


def _announce(store: LabelStore, host: str, port: int) -> None:
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    (wanting, items), labellers = store.open_items(), store.labellers()
    screen.console.print(f"page       {address}   (Ctrl-C ends it)")
    screen.console.print(f"database   {escape(store.address)}")
    screen.console.print(f"items      {items}, of which {wanting} want labels" if items else f"items      {NO_ITEMS}")
    screen.console.print(f"labellers  {escape(', '.join(labellers)) or NO_LABELLERS}")
    if host not in LOOPBACK:
        screen.console.print(f"[yellow]{EXPOSED}[/]")
