"""The `rlhf` command: running the pipeline, looking at its results, and its services."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from flows.cli import console, feedback, garbage, labels, models, plan, reward, rollouts, serve
from flows.processes import ERROR_VARIABLE, die_with_parent, end_soon, project_lock, write_error
from tasks.core.errors import ConfigError, RLHFError, StageError, disk_errors
from tasks.core.paths import stage_dir
from tasks.core.terminal import allow_all_characters

if TYPE_CHECKING:
    from tasks.data.fit import Misfit

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
data = typer.Typer(help="The data from which the pipeline starts.", no_args_is_help=True)
app.add_typer(data, name="data")
app.add_typer(models.app)
app.add_typer(rollouts.app)
app.add_typer(garbage.app)
app.add_typer(plan.app)
app.add_typer(labels.app, name="label")
app.add_typer(reward.app, name="reward")
app.add_typer(serve.app)
app.add_typer(feedback.app, name="feedback")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"rlhf {version('rlhf-pipeline')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option(callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Train a language model from human feedback: run the stages, look at results, label, promote."""


def main() -> None:
    """Entry point: an error that the user can cure is one message and exit status 1."""
    allow_all_characters()
    if ERROR_VARIABLE in os.environ:  # a run in a worktree, which another `rlhf` has started
        die_with_parent()
    status = 1
    try:
        with disk_errors():
            app()
    except RLHFError as error:
        console.print_error(error)
        write_error(error)
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        end_soon(status)
    sys.exit(status)


@app.command()
def run(
    stages: Annotated[list[str] | None, typer.Argument(help="Stages, with all that they need; default: all.")] = None,
    preset: Annotated[str | None, typer.Option(help="Write this preset of infra/presets into params.yaml.")] = None,
    setting: Annotated[list[str] | None, typer.Option("-S", help="Write key=value into params.yaml.")] = None,
    fit: Annotated[bool, typer.Option(help="Write values that fit the data and the model into params.yaml.")] = False,
    force: Annotated[bool, typer.Option(help="Run the named stages even if nothing changed.")] = False,
    pull: Annotated[bool, typer.Option(help="Fetch missing data and results from the DVC remote.")] = False,
    push: Annotated[bool, typer.Option(help="Send each stage's results to the DVC remote.")] = False,
    retries: Annotated[int, typer.Option(min=0, help="Run a failed stage again this many times.")] = 0,
    parallel: Annotated[int, typer.Option(min=0, help="Run up to so many stages at once, each its own process.")] = 0,
    timeout: Annotated[float | None, typer.Option(min=1, help="Seconds after which a stage is ended as hung.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Let so many processes share the training, a GPU each.")] = 1,
    anyway: Annotated[bool, typer.Option(help="Run also what does not fit into memory, by `rlhf plan`.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Run under so many seeds, and compare those.")] = 1,
    seeds_of: Annotated[
        Literal["policy", "all"], typer.Option(help="What the seeds differ in: the policies' training, or all stages.")
    ] = "policy",
) -> None:
    """Bring the pipeline up to date and compare the policies."""
    root = console.enter_project()
    if stages:  # checked before params.yaml is changed and a server started
        from tasks.runtime import dvc_stages

        dvc_stages.check_names(stages, dvc_stages.graph())
    options: dict[str, Any] = {"force": force, "pull": pull, "push": push, "retries": retries}
    options |= {"parallel": parallel, "timeout": timeout, "ranks": ranks, "anyway": anyway}
    resume_hint = "it goes on from the last checkpoint" if seeds == 1 else "what was computed is restored"
    with console.handle_interrupt(resume_hint), project_lock(console.print_waiting):
        _apply_overrides(root, preset, setting or [])
        with _prefect_server() as environment:
            if fit:
                _fit(root, options)
            if seeds > 1:
                _run_seeds(seeds, stages or [], options, environment, whole_chain=seeds_of == "all")
                return
            from flows.pipeline import run_pipeline

            outcomes = run_pipeline(stages or None, **options)
    if any(outcome.stage == "evaluate" for outcome in outcomes):
        console.console.print()
        console.print_comparison()
        console.console.print(f"report: {stage_dir('evaluate') / 'report.html'}")
        console.console.print("curves and samples: rlhf ui    this table: rlhf show    what would run: rlhf status")


@app.command()
def new(
    folder: Annotated[Path, typer.Argument(help="A folder that does not exist, or is empty.")],
    start: Annotated[
        Literal["film", "pairs", "answers", "conversation"],
        typer.Option("--from", help="Film reviews, or a few rows of your kind: pairs, right answers, conversations."),
    ] = "film",
) -> None:
    """Make a project of your own, with parameters, example rows and a folder custom/ for your own code."""
    from flows.new import new_project

    new_project(folder, start)
    console.console.print(f"{folder} is ready: `cd {folder}`, read README.md, then `rlhf run --fit`")


@app.command()
def retrain(
    pull: Annotated[bool, typer.Option(help="Fetch data and results from the DVC remote first.")] = False,
    push: Annotated[bool, typer.Option(help="Send each stage's results to the DVC remote.")] = False,
    approval_hours: Annotated[float, typer.Option(min=0, help="Wait so long for a person's approval.")] = 0,
) -> None:
    """Bring the pipeline up to date with the data, and let the gate decide whether the best policy is promoted."""
    console.enter_project_with_services()
    if approval_hours and not os.environ.get("PREFECT_API_URL"):
        raise ConfigError("--approval-hours: no Prefect server is up whose page could ask somebody; `rlhf up` first")
    with console.handle_interrupt("it goes on from the last checkpoint"), _prefect_server():
        from flows.retrain import retrain as flow

        flow(pull=pull, push=push, approval_hours=approval_hours)


@data.command()
def announce() -> None:
    """Announce a new version of data/ to the standing Prefect server, which starts rlhf-retrain/retrain."""
    console.enter_project_with_services()
    from flows.retrain import announce_data

    console.console.print(f"announced data of md5 {announce_data()}")


@app.command()
def sweep(
    setting: Annotated[list[str], typer.Option("-S", help="key=value,value,…: the values to try; may be repeated.")],
    stages: Annotated[list[str] | None, typer.Argument(help="Stages, with all that they need; default: all.")] = None,
) -> None:
    """Run the pipeline with every combination of some values, without changing this folder, and compare them."""
    console.enter_project_with_services()
    from flows.experiments import sweep as run_all

    with console.handle_interrupt("what was computed is restored"):
        folder = run_all(setting, stages or [])
    path = folder / "variants.json"
    if path.is_file():
        console.print_table(console.variants_table(json.loads(path.read_text(encoding="utf-8"))))
        console.console.print(f"table and plot: {folder}")


@app.command()
def show(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, policy or control → figures.")] = False,
) -> None:
    """Compare the policies of the last evaluation."""
    console.enter_project()
    if as_json:
        print(json.dumps(console.read_evaluation("policies") | console.read_evaluation("controls"), indent=2))
    else:
        console.print_comparison()


@app.command()
def status(as_json: Annotated[bool, typer.Option("--json", help="One JSON list.")] = False) -> None:
    """List the stages that would run, and which parameter or file made it so."""
    console.enter_project()
    from tasks.runtime import dvc_stages

    pending = dvc_stages.stale_stages()
    rows = [(item.stage, "restore" if item.in_run_cache else "run", item.reasons) for item in pending]
    misfits = _misfits_of_status({item.stage for item in pending})
    rows += [(item.stage, "refuse" if item.blocks else "warn", (str(item),)) for item in misfits]
    if as_json:
        keys = ("stage", "action", "reasons")
        print(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=2, ensure_ascii=False))
        return
    if not pending:
        console.console.print("Everything is up to date: `rlhf run` would compute nothing.")
    if not rows:
        return
    table = Table("stage", "would", "why")
    for stage, action, reasons in rows:
        words = {"restore": "be restored", "refuse": "[red]be refused[/]", "warn": "[yellow]warn[/]"}
        table.add_row(stage, words.get(action, action), escape("\n".join(reasons)))
    console.print_table(table)
    if misfits:
        console.console.print("`rlhf run --fit` sets what stands after an arrow.")


def _misfits_of_status(pending: set[str]) -> "list[Misfit]":
    """The misfits, if what they are found in is up to date."""
    from tasks.data.fit import READS, project_misfits
    from tasks.runtime import dvc_stages

    known = set(READS) <= dvc_stages.graph().keys() and not pending & set(READS)
    return project_misfits() if known else []


@app.command()
def ui(port: Annotated[int, typer.Option(help="On 127.0.0.1.")] = 5000) -> None:
    """Look at curves, samples and models in MLflow; stop it with Ctrl-C."""
    console.enter_project()
    from flows.services import running_services
    from tasks.runtime import mlflow_store, mlflow_view

    running = running_services().get("mlflow")
    _, experiment = mlflow_store.open_store()
    address = running.address if running else f"http://127.0.0.1:{port}"
    if running:
        console.console.print(f"MLflow is up at {address}")
    else:
        console.console.print(f"MLflow is starting at {address} (about 20 s); stop it with Ctrl-C")
    console.console.print(f"pipelines side by side: {address}{mlflow_view.view_path(experiment)}", soft_wrap=True)
    if not running:
        command, environment = mlflow_store.server_command(port)
        os.execve(command[0], command, environment)


@app.command()
def up(
    prefect_port: Annotated[int, typer.Option(help="Prefect's server, on 127.0.0.1.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="MLflow's server, on 127.0.0.1.")] = 5000,
) -> None:
    """Start Prefect's server and worker and MLflow, and deploy what prefect.yaml lists; `rlhf down` ends them."""
    console.enter_project()
    from flows import services

    running = services.start(prefect_port, mlflow_port, console.console.print)
    console.console.print(f"Prefect   {running['prefect'].address.removesuffix('/api')}   runs, schedules, deployments")
    console.console.print(f"MLflow    {running['mlflow'].address}   curves, samples, models")
    console.console.print("`rlhf run` now uses them; `rlhf down` ends them")


@app.command()
def down() -> None:
    """End what `rlhf up` started, and the run that it may be doing."""
    console.enter_project()
    from flows import services

    ended = services.stop()
    console.console.print(f"ended: {', '.join(ended)}" if ended else "nothing was up")


@app.command()
def schedule(
    cron: Annotated[str, typer.Argument(help="Minute, hour, day, month, weekday: '0 2 * * *' is 2 o'clock at night.")],
    timezone: Annotated[str, typer.Option(help="Where that is the time, like Europe/Vienna.")] = "UTC",
) -> None:
    """Run the pipeline at set times, for as long as this command runs; stop it with Ctrl-C."""
    console.enter_project()
    from flows.schedule import serve

    serve(cron, timezone, console.console.print)


def _run_seeds(
    count: int, stages: list[str], options: dict[str, Any], environment: dict[str, str], *, whole_chain: bool
) -> None:
    from flows.experiments import run_seeds

    folder, summary = run_seeds(count, stages, options, environment, whole_chain=whole_chain)
    console.console.print()
    console.print_table(console.seeds_table(summary))
    console.print_seed_differences(summary)
    for sentence in summary["collapsed"]:
        console.console.print(f"[red]collapsed:[/] {escape(sentence)}")
    console.console.print(f"table and plot: {folder}    curves and samples: rlhf ui")
    if summary["failed"]:
        failed = "\n".join(["", *summary["failed"]])
        raise StageError(f"{len(summary['failed'])} of {count} seeds failed; those done are restored next time{failed}")


@contextmanager
def _prefect_server() -> Iterator[dict[str, str]]:
    """Use the standing Prefect server, or start a temporary one while libraries are imported.

    Yields the environment variables by which another process reports to it.
    """
    from flows.services import use_services
    from flows.temporary_server import temporary_server

    use_services()
    with temporary_server() as (address, wait):
        if address:
            console.console.print("[dim]starting a temporary Prefect server (set PREFECT_API_URL to use your own)[/]")
        import flows.pipeline  # noqa: F401
        from tasks.runtime import mlflow_runs

        for handler in logging.getLogger().handlers:  # the terminal shows our lines; Prefect's go to its server alone
            handler.addFilter(lambda record: not record.name.startswith("prefect"))
        logging.raiseExceptions = False  # nor what becomes of those when the server is gone
        mlflow_runs.connect()
        wait()
        from flows import prefect_runs

        with prefect_runs.server_may_leave():
            prefect_runs.release_abandoned()
            yield {"PREFECT_API_URL": address} if address else {}


def _apply_overrides(root: Path, preset: str | None, settings: list[str]) -> None:
    from tasks.config.params import load_preset, parse_override, write_overrides

    changes = [load_preset(root, preset)] if preset else []
    changes += [parse_override(setting) for setting in settings]
    if lines := write_overrides(root / "params.yaml", changes):
        console.console.print("params.yaml changed (undo: git checkout params.yaml)")
        for line in lines:
            console.console.print(f"  {escape(line)}")


def _fit(root: Path, options: dict[str, Any]) -> None:
    """Write every suggestion, by data, model and memory, into params.yaml; one may uncover another."""
    from flows.pipeline import pipeline
    from tasks.data.fit import READS, project_misfits
    from tasks.runtime import dvc_stages

    for _ in range(3):
        pipeline(list(READS), **options | {"force": False})
        found = project_misfits() or plan.check_memory(dvc_stages.graph(), ranks=options["ranks"], blocks=True)
        settings = [f"{item.key}={item.suggestion}" for item in found if item.suggestion]
        if not settings:
            return
        _apply_overrides(root, None, settings)


if __name__ == "__main__":
    main()
