"""New data starts a retrain, and a person may have the last word: real servers, a real worker, toy stages."""

import json
from typing import Any

import pytest

from tests.pipeline.conftest import DVC_YAML, PREPARED, STAGE, Project, dvc_stage, query, rlhf, wait_for

pytestmark = pytest.mark.slow

# What the gate needs beside the four toy stages: a policy with weights, and its evaluation.
MORE_STAGES = [
    dvc_stage("base_model"),
    dvc_stage("ppo", PREPARED, outs=", artifacts/ppo/adapter"),
    dvc_stage(
        "evaluate", "artifacts/ppo/adapter",
        outs="".join(f", artifacts/evaluate/{name}.json" for name in ("policies", "findings", "controls")),
    ),
]  # fmt: skip
FIGURES = {"win_rate": 0.8, "win_rate_low": 0.7, "win_rate_high": 0.9, "kl": 3.0}
EVALUATED = {
    "policies.json": {"sft": {"kl": 0.0}, "ppo": FIGURES},
    "findings.json": {"sft": [], "ppo": []},
    "controls.json": {},
}
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
    select max(start_time) from runs where run_uuid not in (select run_uuid from tags where key = 'rlhf.stage'))
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
    standing.edit("tasks/data/fit.py", 'READS = ("base_model", "prepare")', 'READS = ("toys have no card",)')
    (root / "dvc.yaml").write_text(DVC_YAML.replace("data.txt]", "data]") + "".join(MORE_STAGES))
    (root / "data").mkdir()
    (root / "data" / "first.jsonl").write_text("first\n")
    rlhf(standing, "run")
    assert len(standing.ran()) == 7
    return standing


def gate_of(project: Project) -> dict[str, str]:
    """What the gate said of the last pipeline run."""
    return dict(query(project.root / "mlflow.db", GATE))


def check_refused(project: Project, reason: str) -> None:
    gate = gate_of(project)
    assert gate["gate"] == "refused"
    assert gate["gate.reasons"].startswith(reason)
    assert query(project.root / "mlflow.db", CHAMPION) == []


def test_new_data_starts_a_retrain_for_just_that_data(loop: Project) -> None:
    """The trigger of prefect.yaml; the toy policy is then refused for its KL."""
    loop.edit("params.yaml", "max_kl: 10.0", "max_kl: 1.0")
    (loop.root / "data" / "second.jsonl").write_text("second\n")
    try:
        output = rlhf(loop, "data", "announce")
        wait_for(lambda: bool(loop.ask(TRIGGERED)))
        ((run, parameters),) = loop.ask(TRIGGERED)
        loop.wait_for_state(run, "Completed")
    finally:
        loop.edit("params.yaml", "max_kl: 1.0", "max_kl: 10.0")
    md5 = json.loads(parameters)["data_md5"]
    assert md5.endswith(".dir")
    assert output.strip() == f"announced data of md5 {md5}"
    assert sorted(loop.ran()) == ["collect", "evaluate", "gold_judge", "ppo", "prepare", "sft"]
    assert md5 in loop.lock()
    assert "first\nsecond\n" in (loop.root / "artifacts" / "ppo" / "adapter" / "weights").read_text()
    check_refused(loop, "KL to SFT: 3.00 nats")


def test_data_that_is_not_here_fails_the_retrain(loop: Project) -> None:
    run = loop.run_deployment(RETRAIN, data_md5="0123.dir")
    assert "DataError: this run is for data of md5 0123.dir, but data/ here is" in loop.wait_for_state(run, "Failed")
    assert loop.ran() == []


def test_nobody_approves_in_time(loop: Project) -> None:
    run = loop.run_deployment(RETRAIN, approval_hours=10 / 3600)
    loop.wait_for_state(run, "Paused")
    loop.wait_for_state(run, "Completed")
    check_refused(loop, "nobody approved it within")


def answer(project: Project, **words: Any) -> None:
    """Let a retrain ask for approval, and answer that."""
    run = project.run_deployment(RETRAIN, approval_hours=1)
    wait_for(lambda: bool(project.ask(ASKED, str(run))))
    with project.prefect() as client:
        client.resume_flow_run(run, run_input=words)
    project.wait_for_state(run, "Completed")


def test_a_person_refuses_and_says_why(loop: Project) -> None:
    answer(loop, promote=False, reason="it brags")
    check_refused(loop, "a person refused it: it brags")


def test_a_person_promotes(loop: Project) -> None:
    """Last, since from here on there is a champion, and no toy could duel with it."""
    answer(loop, promote=True)
    gate = gate_of(loop)
    assert (gate["gate"], gate["gate.policy"]) == ("promoted", "ppo")
    assert query(loop.root / "mlflow.db", CHAMPION) == [(1,)]
