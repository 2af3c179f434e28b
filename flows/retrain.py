"""Retraining flow: pipeline on new data, promotion gate, and a new champion or the reasons for the refusal."""

import os
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.events.schemas.events import Event, Resource
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.runtime import flow_run
from prefect.states import Completed
from prefect.utilities.timeout import timeout as time_limit

from flows.cli import console
from flows.pipeline import pipeline
from flows.prefect_runs import hold_flow_run
from flows.processes import project_lock
from flows.services import deployment_name
from tasks.config.params import Params, load_params
from tasks.core.errors import ConfigError, DataError, StageError
from tasks.core.paths import project_root, stage_dir
from tasks.evals.compare import REFERENCE, HackingFinding, Table
from tasks.evals.gate import BASE_STAGES, Decision, decide, select_candidate
from tasks.evals.statistics import Interval
from tasks.runtime import dvc_repo, mlflow_pipeline, provenance, registry
from tasks.runtime.stage_runner import Outcome

__all__ = ["announce_data", "gate", "promote", "retrain"]

GRACE_SECONDS = 60  # longer than we wait for an answer: a run whose time is up at Prefect's server can only fail

ALREADY_CHAMPION = "it is the champion already"

DATA_EVENT = "rlhf.data"  # prefect.yaml's trigger of the deployment `retrain` expects it


class Approval(RunInput):
    """Answer of a person who approves or refuses a promotion."""

    promote: bool = False
    reason: str = ""


@flow(name="rlhf-retrain")
def retrain(
    data_md5: str | None = None,
    pull: bool = False,
    push: bool = False,
    retries: int = 0,
    timeout: float | None = None,
    ranks: int = 1,
    approval_hours: float = 0,
) -> bool:
    """Bring the pipeline up to date with the data, and promote the best policy if the gate lets it pass.

    Args:
        data_md5: the version of `data/` that is meant, as DVC hashes it, else a DataError; None for whatever is there.
        pull, push, retries, timeout, ranks: see `flows.pipeline.pipeline`.
        approval_hours: how long to wait for a person to approve in Prefect's page; 0 for no person.

    Returns:
        Whether there is a new champion.
    """
    hold_flow_run(str(flow_run.id))
    with project_lock(console.print_waiting):
        if pull:
            dvc_repo.pull_data()
        if data_md5 and data_md5 != (actual := dvc_repo.data_md5()):
            raise DataError(
                f"this run is for data of md5 {data_md5}, but data/ here is {actual}: bring that version here "
                "(git pull, then `rlhf run --pull`), or run without data_md5"
            )
        run: State[Any] = pipeline(
            pull=pull, push=push, retries=retries, timeout=timeout, ranks=ranks, return_state=True
        )
        outcomes: list[Outcome] = run.result()
        if not any(outcome.stage == "evaluate" for outcome in outcomes):
            raise StageError("dvc.yaml has no stage evaluate, so nothing can be promoted")
        run_id = str(run.state_details.flow_run_id)
        gate_state: State[Any] = gate(run_id, return_state=True)
        passed: GateResult | None = gate_state.result()
    if passed is None:
        return False
    # Outside of the lock: others may work here while a person decides.
    refusal = _ask_for_approval(passed.decision, approval_hours) if approval_hours else None
    by = "a person, asked by the gate" if approval_hours else "the gate"
    promote_state: State[Any] = promote(run_id, passed, refusal, by, return_state=True)
    return bool(promote_state.result())


@dataclass(frozen=True)
class GateResult:
    """Decision and version of a policy that passed the gate."""

    decision: Decision
    version: registry.Version


@task(cache_policy=NO_CACHE)
def gate(flow_run: str) -> State[GateResult | None]:
    """Apply the gate to the best policy, register it, and report a refusal."""
    params = load_params(project_root() / "params.yaml")
    if params.gate is None:
        raise ConfigError("gate is null in params.yaml: without rules nothing can be promoted")
    table: Table = console.read_evaluation("policies")
    policy = select_candidate(table, params.gate)
    weights = provenance.weight_digests((*BASE_STAGES, policy))
    champion = registry.champion()
    if champion and dict(champion.weights) == weights:
        return _end(flow_run, Decision(policy, ()), "unchanged", (ALREADY_CHAMPION,), None)
    against = _compare_with_champion(policy, params, params.gate.margins, champion) if champion else None
    findings = [HackingFinding(**row) for row in console.read_evaluation("findings")[policy]]
    decision = decide(table, policy, params.gate, findings=findings, against_champion=against)
    version = registry.register(policy, weights, _version_tags(flow_run, table, decision))
    if not decision.accepted:
        return _end(flow_run, decision, "refused", decision.reasons, None)
    if version.withdrawal:
        return _end(flow_run, decision, "refused", (_withdrawal_reason(version),), None)
    return Completed(message=f"{policy}: passed", data=GateResult(decision, version))


@task(cache_policy=NO_CACHE)
def promote(flow_run: str, passed: GateResult, refusal: str | None, by: str) -> State[bool]:
    """Make it the champion, unless a person has refused that."""
    decision = passed.decision
    version = registry.find(str(passed.version.number))  # a person may have decided about it in the meantime
    if refusal:
        registry.mark_refused(version, refusal)
    if refusal := refusal or (_withdrawal_reason(version) if version.withdrawal else None):
        return _end(flow_run, decision, "refused", (refusal,), False)
    if registry.CHAMPION in version.aliases:
        return _end(flow_run, decision, "unchanged", (ALREADY_CHAMPION,), False)
    registry.set_champion(version, by=by)
    return _end(flow_run, decision, "promoted", decision.reasons, True)


def announce_data() -> str:
    """Emit the event that starts the retrain deployment with the md5 of data/ as parameter; return the md5.

    Prefect's `emit_event` does so later, and says nothing where it fails.

    Raises:
        ConfigError: no stage reads a folder data/.
        StageError: no Prefect server is configured, or it does not answer.
    """
    md5 = dvc_repo.data_md5()
    if md5 is None:
        raise ConfigError("there is no folder data/ that a stage of dvc.yaml reads")
    if not os.environ.get("PREFECT_API_URL"):
        raise StageError("no Prefect server that could start a run: `rlhf up`, or set PREFECT_API_URL to yours")
    resource = Resource({"prefect.resource.id": f"rlhf.data.{deployment_name(project_root())}"})
    event = Event(event=DATA_EVENT, resource=resource, payload={"md5": md5})
    try:
        with get_client(sync_client=True) as client:
            client.request("POST", "/events", json=[event.model_dump(mode="json")])
    except httpx.HTTPError as error:
        raise StageError(f"the Prefect server at {os.environ['PREFECT_API_URL']} does not answer: {error}") from error
    return md5


def _compare_with_champion(
    policy: str, params: Params, metrics: Collection[str], champion: registry.Version
) -> dict[str, Interval]:
    from tasks.evals.champion import compare_with_champion  # with torch, which takes seconds

    with tempfile.TemporaryDirectory(prefix="rlhf-champion-") as folder:
        provenance.restore_weights(champion, Path(folder))
        return compare_with_champion(
            policy,
            params.evaluate,
            params.generation,
            params.seed,
            metrics=metrics,
            artifacts=stage_dir("evaluate").parent,
            champion=Path(folder),
            champion_policy=champion.policy,
            environment=params.environment,
        )


def _withdrawal_reason(version: registry.Version) -> str:
    """Reason not to promote a version that a person withdrew: only a person may promote it again."""
    return f"{version.withdrawal}; `rlhf promote {version.number} --reason …` puts it in use again"


def _ask_for_approval(decision: Decision, hours: float) -> str | None:
    """Ask a person for approval; return the reason of a refusal, or None."""
    text = "\n".join([f"Promote {decision.policy}?", *decision.reasons])
    waits = f"{decision.policy} waits up to {hours:g} hours for approval in Prefect's page of this run"
    console.console.print(f"[yellow]{waits}[/]")
    seconds = round(hours * 3600)
    form = Approval.with_initial_data(description=text)
    try:
        with time_limit(seconds):
            answer = pause_flow_run(wait_for_input=form, timeout=seconds + GRACE_SECONDS, poll_interval=5)
    except TimeoutError:
        return f"nobody approved it within {hours:g} hours"
    return None if answer.promote else f"a person refused it: {answer.reason or 'no reason given'}"


def _version_tags(flow_run: str, table: Table, decision: Decision) -> dict[str, str]:
    compared = {policy: row for policy, row in table.items() if policy in (REFERENCE, decision.policy)}
    made_from = provenance.collect_provenance(flow_run, compared, decision.rule_results)
    figures = {key: str(value) for key, value in table[decision.policy].items() if key in ("win_rate", "kl")}
    return {
        **figures,
        "accepted": str(decision.accepted),
        "reasons": "; ".join(decision.reasons),
        "git.commit": made_from.commit,
        "data.md5": dvc_repo.data_md5() or "",
        provenance.PROVENANCE_TAG: made_from.model_dump_json(),
    }


def _end(flow_run: str, decision: Decision, verdict: str, reasons: tuple[str, ...], data: Any) -> State[Any]:
    """Report the decision at the terminal, in MLflow and in Prefect; return the task's state with `data`."""
    console.print_gate_decision(decision.policy, verdict, reasons)
    tags = {"gate": verdict, "gate.policy": decision.policy, "gate.reasons": "; ".join(reasons)}
    mlflow_pipeline.add_to_pipeline(flow_run, tags)
    lines = [f"## {decision.policy}: {verdict}", "", *(f"- {reason}" for reason in reasons), ""]
    lines += ["| rule | measured | required | passed |", "|---|---|---|---|"] if decision.rule_results else []
    lines += [
        f"| {f.rule} | {f.measured} | {f.required} | {'yes' if f.passed else '**no**'} |" for f in decision.rule_results
    ]
    create_markdown_artifact("\n".join(lines), key="rlhf-gate", description=f"{decision.policy}: {verdict}")
    return Completed(message=f"{decision.policy}: {verdict}", data=data)
