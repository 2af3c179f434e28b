"""The pipeline as a Prefect flow: every stage of dvc.yaml, in its order, each as one task.

DVC decides whether a stage runs; Prefect shows what happened to it and why.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from graphlib import TopologicalSorter
from typing import Any

import httpx
from prefect import Task, flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, StateDetails
from prefect.futures import PrefectFuture, as_completed
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.cli import console
from flows.cli.plan import check_memory
from flows.executor import Execution, ensure_stage, stage_log_path, visible_gpus
from flows.prefect_runs import device_slot, hold_flow_run, reporting
from flows.processes import children_terminated, limit_exit_time, project_lock
from tasks.core.errors import ConfigError, StageError
from tasks.core.terminal import allow_all_characters
from tasks.runtime import dvc_repo, dvc_stages, mlflow_pipeline
from tasks.runtime.stage_runner import Outcome

__all__ = ["pipeline", "resolve_plan", "run_pipeline", "stage"]

Plan = Mapping[str, tuple[str, ...]]
"""Stage → the stages that it needs."""

Bind = Callable[[str, Execution], tuple[Task[..., State[Outcome]], dict[str, Any]]]
"""The task of a stage, and its arguments."""


@task(cache_policy=NO_CACHE)
def stage(name: str, execution: Execution, *, force: bool = False, pull: bool = False) -> State[Outcome]:
    """Bring a stage up to date; the state is `Cached` where nothing had to be computed; errors as of `ensure_stage`."""
    with ExitStack() as held:

        def on_start(reasons: Sequence[str], needs_device: bool) -> None:
            if needs_device:
                waits = "[yellow]  waiting for the device: another run computes on it[/]"
                held.enter_context(device_slot(partial(console.console.print, waits)))
            console.print_stage_start(name, reasons, stage_log_path(name) if execution.own_process else None)

        outcome = ensure_stage(
            name, execution, force=force, pull=pull, on_start=on_start, on_wait=console.print_waiting
        )
    console.print_stage_end(name, outcome.result, outcome.seconds, outcome.reasons)
    details = StateDetails(cache_key=outcome.key)
    if outcome.result == "executed":
        return Completed(message=f"Ran: {outcome.reason}", data=outcome, state_details=details)
    if outcome.result == "off":
        return Completed(name="Off", message="Its section in params.yaml is null", data=outcome)
    label = "Unchanged" if outcome.result == "unchanged" else "Restored from the run-cache"
    return Completed(name="Cached", message=f"{label}: {outcome.reason}", data=outcome, state_details=details)


_finished: ContextVar[list[Outcome] | None] = ContextVar("_finished", default=None)
"""Outcomes of a pipeline that is done, whether or not Prefect learns that."""


def run_pipeline(stages: list[str] | None, **options: Any) -> list[Outcome]:
    """`pipeline`, which counts as done when its work is, even if Prefect's server has gone away meanwhile."""
    try:
        return list(pipeline(stages, **options))
    except httpx.TransportError:
        outcomes = _finished.get()
        if outcomes is None:
            raise
        console.print_prefect_away()
        return outcomes


@flow(name="rlhf")
def pipeline(
    stages: list[str] | None = None,
    force: bool = False,
    pull: bool = False,
    push: bool = False,
    retries: int = 0,
    parallel: int = 0,
    timeout: float | None = None,
    ranks: int = 1,
    anyway: bool = False,
) -> list[Outcome]:
    """Bring the named stages and what they need up to date; all of them by default.

    Stages run one after another on this thread: torch's random state is global, and a direct call can be cancelled.
    With `parallel` or `timeout` each runs in a process of its own instead; what they write is the same. A ConfigError
    if both `parallel` and `ranks` ask for several processes, or params.yaml does not fit: see `tasks.data.fit` and
    `tasks.models.stage_plans`.

    Args:
        stages: names in dvc.yaml; None for all.
        force: run the named stages even if nothing changed.
        pull: fetch missing data and results from the DVC remote before running.
        push: send each stage's results to the DVC remote when it is done.
        retries: how often Prefect runs a failed stage again.
        parallel: run up to so many stages at once, where none needs another; 0 for one after another.
        timeout: seconds after which a stage counts as hung and is ended; `retries` may try it again.
        ranks: how many processes of this machine share the work of each stage that trains, a GPU each where there are.
        anyway: run also what does not fit into memory.
    """
    if parallel > 1 and ranks > 1:
        raise ConfigError(f"--parallel {parallel} and --ranks {ranks}: both share out the machine; choose one")
    allow_all_characters()  # of a deployment's run, which begins here
    run_id = str(flow_run.id)
    parameters: dict[str, object] = {"stages": stages or "all", "force": force, "pull": pull, "push": push}
    parameters |= {"retries": retries, "parallel": parallel, "timeout": timeout, "ranks": ranks}
    outcomes = []
    hold_flow_run(run_id)
    with limit_exit_time(), project_lock(console.print_waiting):
        plan = resolve_plan(stages)
        bind = partial(_bind, forced=set(stages or plan) if force else set(), pull=pull, retries=retries)
        if pull:
            dvc_repo.check_remote()
            dvc_repo.pull_data()
        with mlflow_pipeline.pipeline_run(run_id, parameters) as record, mlflow_pipeline.export_run_ids(record, run_id):
            runner = _runner(bind, parallel=parallel, timeout=timeout, ranks=ranks)
            for outcome in _run_checked(plan, runner, anyway=anyway, ranks=ranks):
                record.log_stage(outcome)
                outcomes.append(outcome)
                if push and outcome.result == "executed":
                    _push_outputs(outcome.stage)
            with reporting():
                create_markdown_artifact(
                    console.summary_markdown(outcomes), key="rlhf-pipeline", description="Stages and policies"
                )
        if push:
            console.console.print(f"[dim]the DVC remote has everything; {dvc_repo.push()} files were new[/]")
    _finished.set(outcomes)
    return outcomes


def _runner(bind: Bind, *, parallel: int, timeout: float | None, ranks: int) -> Callable[[Plan], Iterator[Outcome]]:
    """How a plan is run: stage by stage in this process, or each in a process of its own."""
    if parallel or timeout:
        execution = Execution(own_process=True, ranks=ranks, timeout=timeout)
        return partial(_run_concurrently, bind=bind, execution=execution, limit=parallel or 1)
    return partial(_run_sequentially, bind=bind, execution=Execution(ranks=ranks))


def resolve_plan(stages: list[str] | None) -> Plan:
    """The named stages and what they need, each with its needs, in dvc.yaml's order; a StageError for unknown names."""
    needs = dvc_stages.graph()
    dvc_stages.check_names(stages or (), needs)
    plan = set(stages or needs)
    for name in reversed(needs):
        if name in plan:
            plan.update(needs[name])
    return {name: needs[name] for name in needs if name in plan}


def _bind(
    name: str, execution: Execution, *, forced: Container[str], pull: bool, retries: int
) -> tuple[Task[..., State[Outcome]], dict[str, Any]]:
    stage_task = stage.with_options(name=name, task_run_name=name, retries=retries)
    return stage_task, {"name": name, "execution": execution, "force": name in forced, "pull": pull}


def _push_outputs(name: str) -> None:
    """Send a stage's results; a remote that does not answer is no reason to stop: all is sent once more at the end."""
    try:
        dvc_repo.push(name)
    except StageError as error:
        console.print_warning(f"not sent to the DVC remote, tried again at the end: {error}")


def _run_checked(
    plan: Plan, run: Callable[[Plan], Iterator[Outcome]], *, anyway: bool, ranks: int
) -> Iterator[Outcome]:
    """Run the plan; before the stages that train, compare params.yaml with the data, the base model and the memory."""
    from tasks.data.fit import READS, format_misfits, project_misfits

    if not set(READS) <= set(plan):
        yield from run(plan)
        return
    first = resolve_plan(list(READS))
    yield from run(first)
    rest = {name: tuple(need for need in plan[name] if need not in first) for name in plan if name not in first}
    runs = {item.stage for item in dvc_stages.stale_stages() if item.stage in rest and not item.in_run_cache}
    found = [item for item in project_misfits() if item.stage in rest] if runs else []
    if not any(item.blocks for item in found):
        found += check_memory(runs, ranks=ranks, blocks=not anyway)
    if blocking := [item for item in found if item.blocks]:
        raise ConfigError(format_misfits(blocking))
    for item in found:
        console.print_warning(str(item))
    yield from run(rest)


def _run_sequentially(plan: Plan, bind: Bind, execution: Execution) -> Iterator[Outcome]:
    for name in plan:
        stage_task, arguments = bind(name, execution)
        state: State[Any] = stage_task(**arguments, return_state=True)
        yield state.result()


def _run_concurrently(plan: Plan, bind: Bind, execution: Execution, limit: int) -> Iterator[Outcome]:
    """Start each stage as soon as what it needs is done; after a failure finish what is running, but start no more.

    Prefect's `wait_for` would start other branches after a failure, and waiting tasks would fill its task runner.
    """
    devices: list[str | None] = [None] if execution.ranks > 1 else [*visible_gpus()] or [None]
    free_devices = [devices[place % len(devices)] for place in range(limit)]
    order = TopologicalSorter(plan)
    order.prepare()
    ready, failed = list(order.get_ready()), None
    running: dict[PrefectFuture[Any], tuple[str, str | None]] = {}
    with children_terminated():
        while running or (ready and not failed):
            while ready and free_devices and not failed:
                name, device = ready.pop(0), free_devices.pop(0)
                stage_task, arguments = bind(name, replace(execution, device=device))
                running[stage_task.submit(**arguments)] = name, device
            future = next(as_completed(list(running)))
            name, device = running.pop(future)
            free_devices.append(device)
            future.wait()  # so that its state is the last one
            if future.state.is_completed():
                order.done(name)
                ready += order.get_ready()
                yield future.result()
            else:
                failed = failed or future
    if failed:
        failed.result()
