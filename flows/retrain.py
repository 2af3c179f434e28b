"""The continuous loop: new data → everything that it changes → the gate → a new champion, or the reasons why not."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.states import Completed
from prefect.utilities.timeout import timeout as time_limit

from flows import screen, workspace
from flows.pipeline import pipeline
from flows.work import Outcome
from tasks.core.errors import ConfigError, DataError, StageError
from tasks.core.params import Params, load_params
from tasks.core.paths import artifacts, project_root
from tasks.evals.compare import REFERENCE, Table
from tasks.evals.findings import Finding
from tasks.evals.gate import PARTS, Decision, candidate, decide
from tasks.evals.statistics import Interval
from tasks.runtime import provenance, recording, registry, versioning

__all__ = ["Approval", "Passed", "gate", "promote", "retrain"]

# How much longer Prefect's server waits for an answer than we do: a run whose time is up there can only fail.
GRACE_SECONDS = 60

IN_USE = "it is the champion already"


class Approval(RunInput):
    """What a person answers before a policy is promoted."""

    promote: bool = False
    why: str = ""


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
        data_md5: the version of `data/` that is meant, as DVC hashes it; None for whatever is there.
        pull: fetch data and results from the DVC remote first.
        push: send results to the DVC remote.
        retries: how often a failed stage is run again.
        timeout: seconds after which a stage counts as hung.
        ranks: how many processes share the work of each stage that trains.
        approval_hours: how long to wait for a person to approve in Prefect's page; 0 for no person.

    Returns:
        Whether there is a new champion.

    Raises:
        DataError: the data here is of another version.
    """
    with workspace.alone(screen.run_waits):
        if pull:
            versioning.pull_data()
        _check_data(data_md5)
        state: State[Any] = pipeline(
            pull=pull, push=push, retries=retries, timeout=timeout, ranks=ranks, return_state=True
        )
        outcomes: list[Outcome] = state.result()
        if not any(outcome.stage == "evaluate" for outcome in outcomes):
            raise StageError("dvc.yaml has no stage evaluate, so nothing can be promoted")
        run_id = str(state.state_details.flow_run_id)
        judged: State[Any] = gate(run_id, return_state=True)
        passed: Passed | None = judged.result()
    if passed is None:
        return False
    refusal = _refusal(passed.decision, approval_hours) if approval_hours else None  # others may work here meanwhile
    by = "a person, asked by the gate" if approval_hours else "the gate"
    concluded: State[Any] = promote(run_id, passed, refusal, by, return_state=True)
    return bool(concluded.result())


@dataclass(frozen=True)
class Passed:
    """What the gate has let pass."""

    decision: Decision
    version: registry.Version


@task(cache_policy=NO_CACHE)
def gate(flow_run: str) -> State[Passed | None]:
    """Let the gate decide about the best policy; what it refuses ends here, and the reasons go to all who watch."""
    params = load_params(project_root() / "params.yaml")
    if params.gate is None:
        raise ConfigError("gate is null in params.yaml: without rules nothing can be promoted")
    table: Table = screen.read_policies()
    policy = candidate(table, params.gate)
    weights = _weights(policy)
    champion = registry.champion()
    if champion and dict(champion.weights) == weights:
        return Completed(message=_tell(flow_run, Decision(policy, ()), "unchanged", (IN_USE,)), data=None)
    against = _duel(policy, params, params.gate.margins, champion) if champion else None
    signs = [Finding(**row) for row in screen.read_findings()[policy]]
    decision = decide(table, policy, params.gate, signs=signs, against_champion=against)
    version = registry.register(policy, weights, _tags(flow_run, table, decision))
    if not decision.accepted:
        return Completed(message=_tell(flow_run, decision, "refused", decision.reasons), data=None)
    if version.withdrawn:
        return Completed(message=_tell(flow_run, decision, "refused", (_withdrawal(version),)), data=None)
    return Completed(message=f"{policy}: passed", data=Passed(decision, version))


@task(cache_policy=NO_CACHE)
def promote(flow_run: str, passed: Passed, refusal: str | None, by: str) -> State[bool]:
    """Make it the champion, unless a person has refused that."""
    version = registry.find(str(passed.version.number))  # a person may have decided about it in the meantime
    if refusal:
        registry.refuse(version, refusal)
    if refusal := refusal or (_withdrawal(version) if version.withdrawn else None):
        return Completed(message=_tell(flow_run, passed.decision, "refused", (refusal,)), data=False)
    if registry.CHAMPION in version.aliases:
        return Completed(message=_tell(flow_run, passed.decision, "unchanged", (IN_USE,)), data=False)
    registry.set_champion(version, by=by)
    return Completed(message=_tell(flow_run, passed.decision, "promoted", passed.decision.reasons), data=True)


def _check_data(wanted: str | None) -> None:
    found = versioning.data_version()
    if wanted and wanted != found:
        raise DataError(
            f"this run is for data of md5 {wanted}, but data/ here is {found}: bring that version here (git pull, then "
            "`rlhf run --pull`), or run without data_md5"
        )


def _weights(policy: str) -> dict[str, str]:
    """Every folder of weights that makes up the policy, as `stage/folder`, with its md5."""
    return {
        f"{stage}/{Path(path).name}": md5
        for stage in (*PARTS, policy)
        for path, md5 in versioning.output_digests(stage).items()
        if Path(path).name in recording.WEIGHTS
    }


def _duel(policy: str, params: Params, metrics: Collection[str], champion: registry.Version) -> dict[str, Interval]:
    from tasks.evals.duel import duel  # with torch, which takes seconds

    with tempfile.TemporaryDirectory(prefix="rlhf-champion-") as folder:
        provenance.restore(champion, Path(folder))
        return duel(
            policy,
            params.evaluate,
            params.generation,
            params.seed,
            metrics=metrics,
            artifacts=artifacts("evaluate").parent,
            champion=Path(folder),
            champion_policy=champion.policy,
            environment=params.environment,
        )


def _withdrawal(version: registry.Version) -> str:
    """What a person has taken back, only a person puts in use again."""
    return f"{version.withdrawn}; `rlhf promote {version.number} --why …` puts it in use again"


def _refusal(decision: Decision, hours: float) -> str | None:
    """Ask a person; why the policy is not promoted, or None where it is."""
    text = "\n".join([f"Promote {decision.policy}?", *decision.reasons])
    screen.approval_waits(decision.policy, hours)
    seconds = round(hours * 3600)
    form = Approval.with_initial_data(description=text)
    try:
        with time_limit(seconds):
            answer = pause_flow_run(wait_for_input=form, timeout=seconds + GRACE_SECONDS, poll_interval=5)
    except TimeoutError:
        return f"nobody approved it within {hours:g} hours"
    return None if answer.promote else f"a person refused it: {answer.why or 'no reason given'}"


def _tags(flow_run: str, table: Table, decision: Decision) -> dict[str, str]:
    compared = {policy: row for policy, row in table.items() if policy in (REFERENCE, decision.policy)}
    made_from = provenance.collect(flow_run, compared, decision.findings)
    figures = {key: str(value) for key, value in table[decision.policy].items() if key in ("win_rate", "kl")}
    return {
        **figures,
        "accepted": str(decision.accepted),
        "reasons": "; ".join(decision.reasons),
        "git.commit": made_from.commit,
        "data.md5": versioning.data_version() or "",
        provenance.ORIGIN: made_from.model_dump_json(),
    }


def _tell(flow_run: str, decision: Decision, verdict: str, reasons: tuple[str, ...]) -> str:
    """Say what became of a policy, at the terminal, in MLflow and in Prefect; the same in a line."""
    screen.gate_ends(decision.policy, verdict, reasons)
    recording.tag_pipeline(
        flow_run, {"gate": verdict, "gate.policy": decision.policy, "gate.reasons": "; ".join(reasons)}
    )
    lines = [f"## {decision.policy}: {verdict}", "", *(f"- {reason}" for reason in reasons), ""]
    lines += ["| rule | found | asked | holds |", "|---|---|---|---|"] if decision.findings else []
    lines += [f"| {f.rule} | {f.found} | {f.asked} | {'yes' if f.holds else '**no**'} |" for f in decision.findings]
    create_markdown_artifact("\n".join(lines), key="rlhf-gate", description=f"{decision.policy}: {verdict}")
    return f"{decision.policy}: {verdict}"
