"""The `rlhf` command."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from flows import cli_labels, model_commands, screen, worktrees
from flows.commandline import enter, enter_served, interruptible
from tasks.core.errors import ConfigError, RLHFError, StageError
from tasks.core.paths import stage_dir

__all__ = ["app"]

commands = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
commands.add_typer(model_commands.commands)
commands.add_typer(cli_labels.commands, name="label")


def app() -> None:
    """Entry point: an error that the user can cure is one message and exit status 1."""
    try:
        commands()
    except RLHFError as error:
        screen.failed(error)
        worktrees.tell(error)
        sys.exit(1)


@commands.command()
def run(
    stages: Annotated[list[str] | None, typer.Argument(help="Stages, with all that they need; default: all.")] = None,
    preset: Annotated[str | None, typer.Option(help="Write this preset of infra/presets into params.yaml.")] = None,
    setting: Annotated[list[str] | None, typer.Option("-S", help="Write key=value into params.yaml.")] = None,
    force: Annotated[bool, typer.Option(help="Run the named stages even if nothing changed.")] = False,
    pull: Annotated[bool, typer.Option(help="Fetch missing data and results from the DVC remote.")] = False,
    push: Annotated[bool, typer.Option(help="Send each stage's results to the DVC remote.")] = False,
    retries: Annotated[int, typer.Option(min=0, help="Run a failed stage again this many times.")] = 0,
    parallel: Annotated[int, typer.Option(min=0, help="Run up to so many stages at once, each its own process.")] = 0,
    timeout: Annotated[float | None, typer.Option(min=1, help="Seconds after which a stage is ended as hung.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Let so many processes share the training, a GPU each.")] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="Train the policies under so many seeds, and compare those.")] = 1,
) -> None:
    """Bring the pipeline up to date and compare the policies."""
    root = enter()
    from flows import workspace

    options: dict[str, Any] = {"force": force, "pull": pull, "push": push, "retries": retries}
    options |= {"parallel": parallel, "timeout": timeout, "ranks": ranks}
    comfort = "it goes on from the last checkpoint" if seeds == 1 else "what was computed is restored"
    with interruptible(comfort), workspace.alone(screen.run_waits):
        _change_params(root, preset, setting or [])
        with _prefect() as environment:
            if seeds > 1:
                _run_seeds(seeds, stages or [], options, environment)
                return
            from flows.pipeline import pipeline

            outcomes = pipeline(stages or None, **options)
    if any(outcome.stage == "evaluate" for outcome in outcomes):
        screen.console.print()
        screen.show(screen.comparison(screen.read_policies()))
        screen.console.print(f"report: {stage_dir('evaluate') / 'report.html'}")
        screen.console.print("curves and samples: rlhf ui    this table: rlhf show    what would run: rlhf status")


@commands.command()
def retrain(
    pull: Annotated[bool, typer.Option(help="Fetch data and results from the DVC remote first.")] = False,
    push: Annotated[bool, typer.Option(help="Send each stage's results to the DVC remote.")] = False,
    approval_hours: Annotated[float, typer.Option(min=0, help="Wait so long for a person's approval.")] = 0,
) -> None:
    """Bring the pipeline up to date with the data, and let the gate decide whether the best policy is promoted."""
    enter_served()
    if approval_hours and not os.environ.get("PREFECT_API_URL"):
        raise ConfigError("--approval-hours: no Prefect server is up whose page could ask somebody; `rlhf up` first")
    with interruptible("it goes on from the last checkpoint"), _prefect():
        from flows.retrain import retrain as flow

        flow(pull=pull, push=push, approval_hours=approval_hours)


@commands.command()
def announce() -> None:
    """Tell the standing Prefect server that data/ has a new version: it starts the deployment rlhf-retrain/retrain."""
    enter_served()
    from tasks.core import versioning

    md5 = versioning.data_version()
    if md5 is None:
        raise ConfigError("there is no folder data/ that a stage of dvc.yaml reads")
    from flows.events import announce_data

    announce_data(md5)
    screen.console.print(f"announced data of md5 {md5}")


@commands.command()
def sweep(
    setting: Annotated[list[str], typer.Option("-S", help="key=value,value,…: the values to try; may be repeated.")],
    stages: Annotated[list[str] | None, typer.Argument(help="Stages, with all that they need; default: all.")] = None,
) -> None:
    """Run the pipeline with every combination of some values, without changing this folder, and compare them."""
    enter_served()
    from flows.sweep import sweep as run_all

    with interruptible("what was computed is restored"):
        folder = run_all(setting, stages or [])
    path = folder / "variants.json"
    if path.is_file():
        screen.show(screen.variants(json.loads(path.read_text(encoding="utf-8"))))
        screen.console.print(f"table and plot: {folder}")


@commands.command()
def show(as_json: Annotated[bool, typer.Option("--json", help="One JSON object, policy → figures.")] = False) -> None:
    """Compare the policies of the last evaluation."""
    enter()
    policies = screen.read_policies()
    if as_json:
        print(json.dumps(policies, indent=2))
    else:
        screen.show(screen.comparison(policies))


@commands.command()
def status(as_json: Annotated[bool, typer.Option("--json", help="One JSON list.")] = False) -> None:
    """Which stages would run, and which parameter or file made it so."""
    enter()
    from tasks.core import versioning

    waiting = versioning.pending()
    if as_json:
        actions = [("restore" if item.recorded else "run", item) for item in waiting]
        rows = [{"stage": item.stage, "action": action, "reasons": item.reasons} for action, item in actions]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    if not waiting:
        screen.console.print("Everything is up to date: `rlhf run` would compute nothing.")
        return
    table = Table()
    for column in ("stage", "would", "why"):
        table.add_column(column)
    for item in waiting:
        table.add_row(item.stage, "be restored" if item.recorded else "run", escape("\n".join(item.reasons)))
    screen.show(table)


@commands.command()
def ui(port: Annotated[int, typer.Option(help="On 127.0.0.1.")] = 5000) -> None:
    """Look at curves, samples and models in MLflow; stop it with Ctrl-C."""
    enter()
    from flows import services
    from tasks.core import mlflow_store

    if standing := services.running().get("mlflow"):
        screen.console.print(f"MLflow is up at {standing.address}")
        return

    command, environment = mlflow_store.server_command(port)
    screen.console.print(f"MLflow is starting at http://127.0.0.1:{port} (about 20 s); stop it with Ctrl-C")
    os.execve(command[0], command, environment)


@commands.command()
def up(
    prefect_port: Annotated[int, typer.Option(help="Prefect's server, on 127.0.0.1.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="MLflow's server, on 127.0.0.1.")] = 5000,
) -> None:
    """Start Prefect's server and worker and MLflow, and deploy what prefect.yaml lists; `rlhf down` ends them."""
    enter()
    from flows import services

    standing = services.up(prefect_port, mlflow_port, screen.console.print)
    screen.console.print(f"Prefect   {standing['prefect'].address.removesuffix('/api')}   runs, schedules, deployments")
    screen.console.print(f"MLflow    {standing['mlflow'].address}   curves, samples, models")
    screen.console.print("`rlhf run` now uses them; `rlhf down` ends them")


@commands.command()
def down() -> None:
    """End what `rlhf up` started, and the run that it may be doing."""
    enter()
    from flows import services

    ended = services.down()
    screen.console.print(f"ended: {', '.join(ended)}" if ended else "nothing was up")


@commands.command()
def schedule(
    cron: Annotated[str, typer.Argument(help="Minute, hour, day, month, weekday: '0 2 * * *' is 2 o'clock at night.")],
    timezone: Annotated[str, typer.Option(help="Where that is the time, like Europe/Vienna.")] = "UTC",
) -> None:
    """Run the pipeline at set times, for as long as this command runs; stop it with Ctrl-C."""
    root = enter()
    from flows.schedule import serve

    serve(root, cron, timezone)


def _run_seeds(count: int, stages: list[str], options: dict[str, Any], environment: dict[str, str]) -> None:
    from flows.seeds import seeds

    folder, report = seeds(count, stages, options, environment)
    screen.console.print()
    screen.show(screen.seeds(report))
    screen.collapsed(report["collapsed"])
    screen.console.print(f"table and plot: {folder}    curves and samples: rlhf ui")
    if report["failed"]:
        failed = "\n".join(report["failed"])
        raise StageError(
            f"{len(report['failed'])} of {count} seeds failed; those done are restored next time\n{failed}"
        )


@contextmanager
def _prefect() -> Iterator[dict[str, str]]:
    """A Prefect server to report to: the standing one, or a temporary one that starts while libraries are imported.

    Gives the variables by which another process reports to it, too.
    """
    from flows import services
    from flows.server import temporary_server

    services.use()
    with temporary_server() as server:
        if server.address:
            screen.server_starts()
        import flows.pipeline  # noqa: F401
        from tasks.core import recording

        _calm_prefect()
        recording.prepare()
        server.wait()
        yield {"PREFECT_API_URL": server.address} if server.address else {}


def _change_params(root: Path, preset: str | None, settings: list[str]) -> None:
    from tasks.config.params import load_params, load_preset, parse_override, write_overrides

    path = root / "params.yaml"
    changes = [load_preset(root, preset)] if preset else []
    changes += [parse_override(setting) for setting in settings]
    lines = write_overrides(path, changes) if changes else []
    load_params(path)
    if lines:
        screen.console.print("params.yaml changed (undo: git checkout params.yaml)")
        for line in lines:
            screen.console.print(f"  {escape(line)}")


def _calm_prefect() -> None:
    """Prefect's records still go to its server; the terminal shows our lines, and an error once."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda record: not record.name.startswith("prefect"))


if __name__ == "__main__":
    app()
