"""New data starts a retrain, and a person may have the last word: real servers, a real worker, toy stages."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.pipeline.conftest import DVC_YAML, STAGE, ask, deployment_run, prefect, query, rlhf, wait_for_state

if TYPE_CHECKING:
    from tests.pipeline.conftest import Project

pytestmark = pytest.mark.slow

# What the gate needs beside the four toy stages: a policy with weights, and its evaluation.
MORE_STAGES = """
  base_model:
    cmd: python -m tasks.base_model
    deps: [tasks/base_model.py]
    outs: [artifacts/base_model/result]
    metrics: [artifacts/base_model/metrics.json]
  ppo:
    cmd: python -m tasks.ppo
    deps: [tasks/ppo.py, artifacts/prepare/result]
    outs: [artifacts/ppo/result, artifacts/ppo/adapter]
    metrics: [artifacts/ppo/metrics.json]
  evaluate:
    cmd: python -m tasks.evaluate
    deps: [tasks/evaluate.py, artifacts/ppo/adapter]
    outs: [artifacts/evaluate/result, artifacts/evaluate/policies.json, artifacts/evaluate/findings.json]
    metrics: [artifacts/evaluate/metrics.json]
"""
FIGURES = {"win_rate": 0.8, "win_rate_low": 0.7, "win_rate_high": 0.9, "kl": 3.0}
EVALUATED = {"policies.json": {"sft": {"kl": 0.0}, "ppo": FIGURES}, "findings.json": {"sft": [], "ppo": []}}
WRITES = {
    "base_model": "",
    "ppo": '(out / "adapter").mkdir(); (out / "adapter" / "weights").write_text("".join(read))',
    "evaluate": f"[(out / name).write_text(json.dumps(content)) for name, content in {EVALUATED}.items()]",
}
RETRAIN = "rlhf-retrain/retrain"

TRIGGERED = """
select id, parameters from flow_run where json_extract(created_by, '$.type') = 'AUTOMATION'
"""
ASKED = "select id from flow_run_input where flow_run_id = ? and key like '%-schema'"
GATE = """
select tags.key, tags.value from tags join runs using (run_uuid) where tags.key like 'gate%' and runs.start_time = (
    select max(start_time) from runs where name = 'pipeline')
"""
CHAMPION = "select version from registered_model_aliases where alias = 'champion'"


@pytest.fixture(scope="module")
def loop(standing: Project) -> Project:
    """A finished project with a policy, its evaluation, a folder `data`, and services up."""
    root = standing.root
    for name, writes in WRITES.items():
        reads = "artifacts.prepare" if name == "ppo" else ""
        text = STAGE.format(name=name, sections="params, seed: int", reads=reads)
        (root / "tasks" / f"{name}.py").write_text(text.replace("    metrics = ", f"    {writes}\n    metrics = "))
    standing.edit(
        "tasks/collect.py", "[*read,", '[*(file.read_text() for file in sorted(pathlib.Path("data").iterdir())),'
    )
    (root / "dvc.yaml").write_text(DVC_YAML.replace("data.txt]", "data]") + MORE_STAGES)
    (root / "data").mkdir()
    (root / "data" / "first.jsonl").write_text("first\n")
    rlhf(standing, "run")
    assert len(standing.ran()) == 7
    return standing


def gate_of(project: Project) -> dict[str, str]:
    """What the gate said of the last pipeline run."""
    return dict(query(project.root / "mlflow.db", GATE))


def champions(project: Project) -> list[tuple[Any, ...]]:
    return query(project.root / "mlflow.db", CHAMPION)


def test_new_data_starts_a_retrain_for_just_that_data(loop: Project) -> None:
    """The trigger of prefect.yaml; the toy policy is then refused for its KL."""
    loop.edit("params.yaml", "max_kl: 10.0", "max_kl: 1.0")
    (loop.root / "data" / "second.jsonl").write_text("second\n")
    try:
        output = rlhf(loop, "data", "announce")
        loop.wait_until(lambda: bool(ask(loop, TRIGGERED)))
        ((run, parameters),) = ask(loop, TRIGGERED)
        wait_for_state(loop, run, "Completed")
    finally:
        loop.edit("params.yaml", "max_kl: 1.0", "max_kl: 10.0")
    md5 = json.loads(parameters)["data_md5"]
    assert md5.endswith(".dir")
    assert output.strip() == f"announced data of md5 {md5}"
    assert sorted(loop.ran()) == ["collect", "evaluate", "gold_judge", "ppo", "prepare", "sft"]
    assert md5 in loop.lock()
    assert "first\nsecond\n" in (loop.root / "artifacts" / "ppo" / "adapter" / "weights").read_text()
    gate = gate_of(loop)
    assert gate["gate"] == "refused"
    assert "KL to SFT: 3.00 nats" in gate["gate.reasons"]
    assert champions(loop) == []


def test_data_that_is_not_here_fails_the_retrain(loop: Project) -> None:
    run = deployment_run(loop, RETRAIN, data_md5="0123.dir")
    assert "DataError: this run is for data of md5 0123.dir, but data/ here is" in wait_for_state(loop, run, "Failed")
    assert loop.ran() == []


def test_nobody_approves_in_time(loop: Project) -> None:
    run = deployment_run(loop, RETRAIN, approval_hours=10 / 3600)
    wait_for_state(loop, run, "Paused")
    wait_for_state(loop, run, "Completed")
    gate = gate_of(loop)
    assert gate["gate"] == "refused"
    assert gate["gate.reasons"].startswith("nobody approved it within")
    assert champions(loop) == []


def answer(project: Project, **words: Any) -> dict[str, str]:
    """Let a retrain ask for approval, answer that, and return what the gate then said."""
    run = deployment_run(project, RETRAIN, approval_hours=1)
    project.wait_until(lambda: bool(ask(project, ASKED, str(run))))
    with prefect(project) as client:
        client.resume_flow_run(run, run_input=words)
    wait_for_state(project, run, "Completed")
    return gate_of(project)


def test_a_person_refuses_and_says_why(loop: Project) -> None:
    gate = answer(loop, promote=False, reason="it brags")
    assert gate["gate"] == "refused"
    assert gate["gate.reasons"] == "a person refused it: it brags"
    assert champions(loop) == []


def test_a_person_promotes(loop: Project) -> None:
    """Last, since from here on there is a champion, and no toy could duel with it."""
    gate = answer(loop, promote=True)
    assert gate["gate"] == "promoted"
    assert gate["gate.policy"] == "ppo"
    assert champions(loop) == [(1,)]
