"""The pipeline: every stage of dvc.yaml, in its order, each brought up to date."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prefect import Task, flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture, as_completed
from prefect.runtime import flow_run

from flows import screen, workspace
from flows.bridge import stage
from flows.children import stop_children
from flows.devices import gpus
from flows.work import Outcome
from tasks.core.errors import ConfigError, StageError
from tasks.runtime import recording, versioning

__all__ = ["pipeline", "plan"]

Plan = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class _Calls:
    """How each stage's task is called; see `pipeline` for the fields."""

    stages: list[str] | None
    force: bool
    pull: bool
    retries: int
    ranks: int

    def task(self, name: str) -> Task[..., State[Outcome]]:
        return stage.with_options(name=name, task_run_name=name, retries=self.retries)

    def options(self, name: str) -> dict[str, Any]:
        force = self.force and (not self.stages or name in self.stages)
        return {"force": force, "pull": self.pull, "ranks": self.ranks}


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
) -> list[Outcome]:
    """Bring the named stages and what they need up to date; all of them by default.

    Stages run one after another on this thread: torch's random state is global, and a direct call can be cancelled.
    With `parallel` or `timeout` each runs in a process of its own instead; what they write is the same.

    Args:
        stages: names in dvc.yaml; None for all.
        force: run the named stages even if nothing changed.
        pull: fetch missing data and results from the DVC remote before running.
        push: send each stage's results to the DVC remote when it is done.
        retries: how often Prefect runs a failed stage again.
        parallel: run up to so many stages at once, where none needs another; 0 for one after another.
        timeout: seconds after which a stage counts as hung and is ended; `retries` may try it again.
        ranks: how many processes of this machine share the work of each stage that trains, a GPU each where there are.

    Raises:
        ConfigError: both `parallel` and `ranks` ask for several processes.
    """
    if parallel > 1 and ranks > 1:
        raise ConfigError(f"--parallel {parallel} and --ranks {ranks}: both share out the machine; choose one")
    run_id = str(flow_run.id)
    asked = {"stages": stages or "all", "force": force, "pull": pull, "push": push, "retries": retries}
    shape = {"parallel": parallel, "timeout": timeout, "ranks": ranks}
    calls = _Calls(stages, force, pull, retries, ranks)
    outcomes = []
    with workspace.alone(screen.run_waits):
        wanted = plan(stages)
        if pull:
            versioning.check_remote()
            versioning.pull_data()
        with recording.pipeline_run(run_id, {**asked, **shape}) as record, recording.flow_environment(record, run_id):
            if parallel or timeout:
                results = _side_by_side(wanted, calls, parallel or 1, timeout)
            else:
                results = _in_turn(wanted, calls)
            for outcome in results:
                record.log_stage(outcome.stage, outcome.key, outcome.result, outcome.why, outcome.metrics)
                outcomes.append(outcome)
                if push and outcome.result == "executed":
                    _push(outcome.stage)
            create_markdown_artifact(screen.markdown(outcomes), key="rlhf-pipeline", description="Stages and policies")
        if push:
            screen.pushed(versioning.push())
    return outcomes


def _push(name: str) -> None:
    """A remote that does not answer is no reason to stop: everything is sent once more at the end."""
    try:
        versioning.push(name)
    except StageError as error:
        screen.push_waits(error)


def plan(stages: list[str] | None) -> Plan:
    """The named stages and everything they need, each with its needs, in the order of dvc.yaml's graph.

    Raises:
        StageError: dvc.yaml has no stage of that name.
    """
    needs = versioning.graph()
    if unknown := [name for name in stages or [] if name not in needs]:
        raise StageError(f"no stage {unknown[0]!r} in dvc.yaml; its stages are {', '.join(needs)}")
    wanted = set(stages or needs)
    for name in reversed(needs):
        if name in wanted:
            wanted.update(needs[name])
    return {name: needs[name] for name in needs if name in wanted}


def _in_turn(wanted: Plan, calls: _Calls) -> Iterator[Outcome]:
    for name in wanted:
        state: State[Any] = calls.task(name)(name, **calls.options(name), return_state=True)
        yield state.result()


def _side_by_side(wanted: Plan, calls: _Calls, limit: int, timeout: float | None) -> Iterator[Outcome]:
    """Start each stage as soon as what it needs is done; after a failure finish what is going on, but start no more."""
    devices: list[str | None] = [None] if calls.ranks > 1 else [*gpus()] or [None]
    free = [devices[place % len(devices)] for place in range(limit)]
    waiting, done, failed = list(wanted), set[str](), None
    going: dict[PrefectFuture[Any], tuple[str, str | None]] = {}
    try:
        while True:
            ready = [] if failed else [name for name in waiting if done.issuperset(wanted[name])]
            for name in ready[: len(free)]:
                waiting.remove(name)
                device = free.pop(0)
                own = {"own_process": True, "device": device, "timeout": timeout}
                going[calls.task(name).submit(name, **calls.options(name), **own)] = name, device
            if not going:
                break
            future = next(as_completed(list(going)))
            name, device = going.pop(future)
            free.append(device)
            future.wait()  # so that its state is the last one
            if future.state.is_completed():
                done.add(name)
                yield future.result()
            else:
                failed = failed or future
        if failed:
            failed.result()
    finally:
        stop_children()
