"""Flow and DVC share one cache: what either has done, the other knows, and nothing is computed twice."""

import json
import os
import shutil
import signal
import sys
from typing import Any

import pytest

from tests.pipeline.conftest import PATIENCE, STAGES, Project, query, rlhf

NAMES = list(STAGES)


def results(output: str) -> dict[str, str]:
    """Stage → result, from the lines that `rlhf run` prints."""
    words = [line.split() for line in output.splitlines() if line.startswith("✓")]
    return {word[1]: word[2] for word in words}


def test_after_a_flow_dvc_has_nothing_to_do(project: Project) -> None:
    assert "up to date" in project.dvc("status")
    before = project.lock()
    project.dvc("repro")
    assert project.ran() == []
    assert project.lock() == before
    assert "up to date" in project.rlhf("status")


def test_after_dvc_repro_the_flow_is_cached_and_the_lock_is_the_same(fresh: Project, finished: Project) -> None:
    fresh.dvc("repro")
    assert fresh.ran() == NAMES
    assert fresh.lock() == finished.lock()
    output = fresh.rlhf("run")
    assert results(output) == dict.fromkeys(NAMES, "cached")
    assert fresh.ran() == []
    assert "up to date" in fresh.dvc("status")


def test_a_parameter_changes_only_what_is_downstream_and_set_back_restores(project: Project) -> None:
    lock = project.lock()
    output = project.rlhf("run", "-S", "sft.epochs=7")
    assert "sft.epochs: 1 → 7" in output
    assert project.ran() == ["sft"]
    assert results(output) == {"collect": "cached", "prepare": "cached", "sft": "ran", "gold_judge": "cached"}
    assert '"epochs":7' in (project.root / "artifacts/sft/result/data.txt").read_text()
    assert status(project) == []
    output = project.rlhf("run", "-S", "sft.epochs=1")
    assert results(output)["sft"] == "restored"
    assert project.ran() == []
    assert '"epochs":1' in (project.root / "artifacts/sft/result/data.txt").read_text()
    assert project.lock() == lock


def test_a_key_that_is_missing_is_written_so_that_dvc_sees_its_value(project: Project) -> None:
    project.edit("params.yaml", "  max_preference_words: null\n", "")
    assert results(project.rlhf("run"))["prepare"] == "cached"
    assert "  max_preference_words: null\n" in (project.root / "params.yaml").read_text()


def status(project: Project) -> Any:
    return json.loads(project.rlhf("status", "--json"))


def test_status_names_an_input_that_is_new_and_the_one_item_of_a_list_that_changed(project: Project) -> None:
    (project.root / "tasks" / "more.py").touch()
    project.edit("dvc.yaml", "deps: [tasks/sft.py, ", "deps: [tasks/sft.py, tasks/more.py, ")
    project.edit("params.yaml", "target_modules: [q_proj, v_proj]", "target_modules: [q_proj, k_proj]")
    (found,) = status(project)
    assert (found["stage"], found["action"]) == ("sft", "run")
    assert set(found["reasons"]) == {"tasks/more.py is a new input", 'lora.target_modules.1: "v_proj" → "k_proj"'}
    project.rlhf("run")
    assert project.ran() == ["sft"]


def test_a_stage_that_is_off_writes_nothing_and_comes_back_from_the_cache(project: Project) -> None:
    before = (project.root / "params.yaml").read_text()
    written = project.root / "artifacts" / "gold_judge" / "result"
    output = project.rlhf("run", "-S", "gold_judge=null")
    assert results(output)["gold_judge"] == "off"
    assert "gold_judge       running" not in output
    assert project.ran() == []
    assert [path.name for path in written.iterdir()] == ["OFF"]
    assert json.loads((written.parent / "metrics.json").read_text()) == {}
    assert "up to date" in project.dvc("status")
    assert results(project.rlhf("run")) == dict.fromkeys(NAMES, "cached") | {"gold_judge": "off"}
    (project.root / "params.yaml").write_text(before)
    assert results(project.rlhf("run"))["gold_judge"] == "restored"
    assert project.ran() == []
    assert [path.name for path in written.iterdir()] == ["data.txt"]


def test_a_deleted_output_is_restored_not_computed(project: Project) -> None:
    shutil.rmtree(project.root / "artifacts" / "sft" / "result")
    reasons = ["its output artifacts/sft/result is missing"]
    assert status(project) == [{"stage": "sft", "action": "restore", "reasons": reasons}]
    assert results(project.rlhf("run"))["sft"] == "restored"
    assert project.ran() == []
    assert (project.root / "artifacts" / "sft" / "result" / "data.txt").is_file()


def test_touched_code_runs_its_stage_and_what_really_changed_after_it(project: Project) -> None:
    project.edit("tasks/prepare.py", "def prepare", "# a comment changes no output\ndef prepare")
    project.rlhf("run")
    assert project.ran() == ["prepare"]
    project.edit("tasks/prepare.py", '"prepare", str(seed)', '"PREPARE", str(seed)')
    project.rlhf("run")
    assert project.ran() == ["prepare", "sft", "gold_judge"]


def test_a_change_of_flows_or_of_recording_runs_nothing(project: Project) -> None:
    for name in ("flows/pipeline.py", "tasks/runtime/mlflow_runs.py", "tasks/runtime/stage_runner.py"):
        with (project.root / name).open("a") as file:
            file.write("# touched\n")
    assert results(project.rlhf("run")) == dict.fromkeys(NAMES, "cached")


def test_a_failed_stage_leaves_the_lock_alone_and_says_why_once(project: Project) -> None:
    lock = project.lock()
    (project.root / ".rlhf" / "sft.fails").touch()
    for output in (project.rlhf("run", "-S", "sft.epochs=9", expect=1), project.dvc("repro", expect=255)):
        assert output.count("the toy was told to fail") == 1
        assert project.lock() == lock


def test_only_the_named_stage_and_what_it_needs(project: Project) -> None:
    assert list(results(project.rlhf("run", "--force", "sft"))) == ["collect", "prepare", "sft"]
    assert project.ran() == ["sft"]


def test_a_prefect_server_that_does_not_answer_is_one_message(project: Project) -> None:
    output = rlhf(project, "run", expect=1, env=project.environment | {"PREFECT_API_URL": "http://127.0.0.1:9/api"})
    assert "error: the Prefect server at http://127.0.0.1:9/api does not answer" in output
    assert "Traceback" not in output
    assert project.ran() == []


def test_interrupted_it_goes_on_from_its_checkpoint(project: Project) -> None:
    """Ctrl-C as a terminal sends it, to the whole group, with the temporary server that a flow brings up by itself."""
    alone = {name: value for name, value in project.environment.items() if name != "PREFECT_API_URL"}
    process = project.start_and_hold("run", environment=alone)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 130, output
    assert "goes on from the last checkpoint" in output
    assert "Traceback" not in output
    newest = query(project.root / "mlflow.db", "select name, status from runs order by start_time desc limit 2")
    assert sorted(newest) == [("pipeline", "KILLED"), ("sft", "KILLED")]
    assert results(project.check_resumed())["sft"] == "ran"
    assert list((project.root / ".rlhf/checkpoints/sft").iterdir()) == [], "a finished run removes its checkpoints"


def test_inputs_that_change_during_a_run_are_not_recorded(project: Project) -> None:
    """DVC hashes inputs again after a run; without a guard it would record old outputs under the new parameters."""
    lock = project.lock()
    (project.root / ".rlhf" / "sleep").write_text("3")
    project.edit("params.yaml", "epochs: 1", "epochs: 4")
    process = project.start("run", "sft")
    project.wait_for(".rlhf/ran")
    project.edit("params.yaml", "epochs: 4", "epochs: 5")
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 1
    assert "changed while it ran" in output
    assert project.lock() == lock


def keys(project: Project) -> Any:
    code = "import json, tasks.runtime.dvc_stages as v; print(json.dumps({n: v.stage_key(n) for n in v.graph()}))"
    return json.loads(project.command(sys.executable, "-c", code))


@pytest.fixture(scope="module")
def first_keys(finished: Project) -> Any:
    return keys(finished)


@pytest.mark.parametrize(
    ("name", "before", "after", "stages"),
    [
        ("params.yaml", "max_validation_examples: 100", "max_validation_examples: 101", {"sft"}),
        ("data.txt", "data", "dato", {"collect"}),
        ("tasks/sft.py", "import json", "import  json", {"sft"}),
        ("tasks/shared.py", "a", "b", set(NAMES)),
        ("requirements.lock", "1", "2", {"sft"}),
        ("params.yaml", "# Every", "# every", set()),
        ("flows/pipeline.py", '"""The', '"""the', set()),
        ("tasks/core/tracking.py", '"""Log', '"""log', set()),
    ],
)
def test_the_key_changes_with_one_byte_of_what_a_stage_reads_and_with_nothing_else(
    project: Project, first_keys: dict[str, str], name: str, before: str, after: str, stages: set[str]
) -> None:
    project.edit(name, before, after)
    second = keys(project)
    assert {stage for stage in NAMES if first_keys[stage] != second[stage]} == stages


def test_an_error_of_dvc_is_one_message(project: Project) -> None:
    (project.root / "data.txt").unlink()
    assert "data.txt" in project.rlhf("run", expect=1)
    (project.root / "dvc.yaml").write_text("stages: [")
    assert "dvc.yaml" in project.rlhf("run", expect=1)


def test_a_fully_cached_flow_imports_no_model_library(project: Project) -> None:
    code = (
        "import sys; sys.argv = ['rlhf', 'run']\n"
        "from flows.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('HEAVY', [name for name in ('torch', 'transformers', 'trl', 'datasets') if name in sys.modules])"
    )
    assert "HEAVY []" in project.command(sys.executable, "-c", code)


@pytest.mark.slow
def test_dvc_exp_run_works(project: Project) -> None:
    project.commit()
    project.command("git", "config", "user.name", "a")
    project.command("git", "config", "user.email", "a@example.org")
    project.dvc("exp", "run", "-S", "sft.epochs=6")
    assert project.ran() == ["sft"]
    assert results(project.rlhf("run")) == dict.fromkeys(NAMES, "cached")
