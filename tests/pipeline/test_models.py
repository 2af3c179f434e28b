"""What becomes of a registered policy: promoted and rolled back, explained, made again, asked, and handed on."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.core.rows import Prompt, read_rows
from tasks.models.loading import load_policy, load_reference, load_tokenizer
from tests.pipeline.conftest import PATIENCE, Project, query, rlhf, wait_for

# A fixture that runs the pipeline nine times counts for the timeout, too.
pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(1800)]

CHAMPION, REFUSED = "dpo", "grpo"

# Runs where this project cannot be imported: only transformers, torch and, for an adapter, peft.
LOAD = """
import importlib.util, json, pathlib, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
sys.path = [path for path in sys.path if not (pathlib.Path(path) / "tasks" / "core").is_dir()]
assert importlib.util.find_spec("tasks") is None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompts, out = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
base = folder / "base" if (folder / "adapter").is_dir() else folder
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base)
if base != folder:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, folder / "adapter")
model.eval()
with torch.no_grad():
    torch.save([model(**tokenizer(prompt, return_tensors="pt")).logits for prompt in prompts], out)
    print(model.generate(**tokenizer(prompts[0], return_tensors="pt")).shape)
"""


@pytest.fixture(scope="module")
def retrained(tiny: tuple[Project, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, list[str]]:
    """PPO was champion, DPO is, GRPO was refused; and what each retrain printed.

    data/ is tracked by DVC, and all but params.yaml is committed. On random models nobody wins, so the rules are set to
    what each step is to show.
    """
    project = tiny[0].copy(tmp_path_factory.mktemp("models") / "project")
    project.dvc("add", "data")
    project.commit()
    margins = "gate.margins={win_rate: 0.5, repetition: 1, truncated_share: 1}"
    project.rlhf("run", "-S", "gate.min_win_rate=0", "-S", margins, "-S", "gate.policy=ppo")
    outputs = [project.rlhf("retrain"), project.rlhf("retrain")]
    for words in ([f"gate.policy={CHAMPION}"], [f"gate.policy={REFUSED}", "-S", "gate.min_win_rate=0.99"]):
        project.rlhf("run", "-S", *words)
        outputs.append(project.rlhf("retrain"))
    return project, outputs


@pytest.fixture(scope="module")
def promoted(retrained: tuple[Project, list[str]]) -> Project:
    return retrained[0]


def test_retrain_promotes_refuses_and_says_why(retrained: tuple[Project, list[str]]) -> None:
    project, outputs = retrained
    gates = [next(line for line in output.splitlines() if line.startswith("gate ")) for output in outputs]
    assert gates == ["gate ppo: promoted", "gate ppo: unchanged", "gate dpo: promoted", "gate grpo: refused"]
    assert "win rate against SFT, lower end: " in outputs[0]
    assert "win rate against the champion, lower end: " in outputs[2]
    assert "required above 99%" in outputs[3]
    database = project.root / "mlflow.db"
    assert query(database, "select version from registered_model_aliases where alias = 'champion'") == [(2,)]
    tags = dict(query(database, "select key, value from tags where key like 'gate%' order by rowid"))
    assert tags["gate"] == "refused"
    assert "above 99%" in tags["gate.reasons"]


def registered(project: Project) -> dict[int, dict[str, Any]]:
    return {row["version"]: row for row in json.loads(project.rlhf("models", "--json"))}


def in_use(project: Project) -> int:
    return next(number for number, row in registered(project).items() if "champion" in row["aliases"])


def test_the_versions_are_listed(promoted: Project) -> None:
    rows = registered(promoted)
    assert [(row["policy"], row["aliases"], row["gate"]) for row in rows.values()] == [
        ("ppo", [], "accepted"),
        (CHAMPION, ["champion"], "accepted"),
        (REFUSED, ["challenger"], "refused"),
    ]
    output = promoted.rlhf("models")
    assert all(row["commit"][:8] in output for row in rows.values())


def test_the_lineage_of_a_version_is_complete(promoted: Project) -> None:
    found = json.loads(promoted.rlhf("lineage", "--json"))
    runs = dict(query(promoted.root / "mlflow.db", "select run_uuid, name from runs where status = 'FINISHED'"))
    assert [runs[stage["run"]] for stage in found["stages"].values()] == list(found["stages"])
    assert runs[found["pipeline_run"]] not in found["stages"]
    recorded = {md5 for stage in found["stages"].values() for md5 in stage["outputs"].values()}
    lock = promoted.lock()
    assert all(md5 in lock for md5 in recorded)
    assert set(found["weights"].values()) <= recorded
    head = promoted.command("git", "rev-parse", "HEAD").strip()
    assert (found["commit"], found["uncommitted"]) == (head, [])
    assert "policy: dpo" in found["params"], "the file as it was when this version was registered"
    assert found["base_model"]["source"] == "random weights, seed 0"
    assert [source["licence"] for source in found["sources"]] == ["as this project"]
    assert found["data_md5"] in (promoted.root / "data.dvc").read_text()
    assert found["decision"]["promoted.by"] == "the gate"
    output = promoted.rlhf("lineage", "challenger")
    assert "refused: win rate against SFT" in output
    assert found["stages"]["sft"]["run"] in output


def test_a_champion_outlives_the_freeing_of_what_nothing_refers_to(promoted: Project) -> None:
    """The tests below use the versions after it."""
    promoted.rlhf("gc", "--yes")
    status = promoted.rlhf("status")
    assert "up to date" in status, status
    assert "ended" in promoted.rlhf("generate", "the film is", "--model", "1", "--max-new-tokens", "2", "--json")


def test_a_policy_goes_on_from_prompts(promoted: Project) -> None:
    words = ["generate", "the film is", "a plot", "--samples", "2", "--max-new-tokens", "3", "--json"]
    output = promoted.rlhf(*words)
    rows = [json.loads(line) for line in output.splitlines()]
    order = [(prompt, sample) for prompt in ("the film is", "a plot") for sample in (0, 1)]
    assert [(row["prompt"], row["sample"]) for row in rows] == order
    assert promoted.rlhf(*words) == output
    assert promoted.rlhf(*words, "--seed", "1") != output
    assert rlhf(promoted, *words[:1], *words[3:], input="the film is\n\na plot\n") == output
    stages = promoted.rlhf("generate", "x", "--model", "reward_model", expect=1)
    assert "there are 1, 2 (champion), 3 (challenger)" in stages
    assert "whose model writes: dpo, grpo, ppo, sft" in stages


def test_a_chat_answers_each_line_until_its_end(promoted: Project) -> None:
    words = ["chat", "--model", "sft", "--max-new-tokens", "2"]
    output = rlhf(promoted, *words, input="the film is\n\na plot\n")
    assert "the film is" in output
    assert "a plot" in output


@pytest.mark.parametrize("words", [[], ["--adapter"]], ids=["merged", "adapter"])
def test_an_export_loads_without_the_project(promoted: Project, tmp_path: Path, words: list[str]) -> None:
    folder, logits = tmp_path / "out", tmp_path / "logits.pt"
    output = promoted.rlhf("export", str(folder), *words)
    parts = promoted.root / "artifacts"
    prompts = [row.prompt for row in read_rows(parts / "prepare" / "prompts" / "test.jsonl", Prompt)]
    command = [sys.executable, "-I", "-c", LOAD, str(folder), json.dumps(prompts), str(logits)]
    subprocess.run(command, cwd=tmp_path, env=promoted.environment, check=True, capture_output=True)
    found = torch.load(logits)
    policy = load_policy(parts / "base_model", parts / "sft", parts / CHAMPION)
    reference = load_reference(parts / "base_model", parts / "sft")
    tokenizer = load_tokenizer(parts / "base_model")
    apart = [0.0, 0.0]
    for prompt, theirs in zip(prompts, found, strict=True):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        with torch.no_grad():
            for place, model in enumerate((policy, reference)):
                apart[place] = max(apart[place], (model(input_ids=ids).logits - theirs).abs().max().item())
    assert apart[0] < 2e-6 < 1e-3 < apart[1], "the policy, and not the model below it"
    assert "its logits differ by at most" in output
    card = (folder / "README.md").read_text()
    assert f"# {CHAMPION.upper()} policy, version 2" in card
    assert "| tiny | local file infra/presets/tiny.jsonl | as this project | 96 |" in card
    assert str(promoted.root) not in card
    assert "is not empty" in promoted.rlhf("export", str(folder), expect=1)


def test_promotion_and_rollback_are_a_persons_decisions(promoted: Project) -> None:
    assert "Promote it all the same with --reason" in promoted.rlhf("promote", expect=1)
    assert "version 3 (grpo) is the champion" in promoted.rlhf("promote", "--reason", "it rhymes")
    assert registered(promoted)[3]["tags"]["promoted.reason"] == "it rhymes"
    output = promoted.rlhf("rollback", "--reason", "it swears")
    assert "version 2 (dpo) is the champion again; version 3 (grpo) is withdrawn" in output
    promoted.rlhf("run", "-S", "gate.min_win_rate=0")
    refused = promoted.rlhf("retrain")
    assert "gate grpo: refused" in refused, "the gate accepts it now, but a person has withdrawn it"
    assert "it swears; `rlhf promote 3 --reason …` puts it in use again" in refused
    assert in_use(promoted) == 2
    promoted.rlhf("rollback")
    assert in_use(promoted) == 1
    assert "nothing to roll back to" in promoted.rlhf("rollback", expect=1)
    assert "there are 1 (champion), 2, 3 (challenger)" in promoted.rlhf("promote", "9", expect=1)
    assert "there is no champion" in promoted.rlhf("withdraw", "--reason", "it lies")
    assert (registered(promoted)[1]["gate"], registered(promoted)[1]["aliases"]) == ("withdrawn", [])
    assert registered(promoted)[1]["tags"]["withdrawn.reason"] == "it lies"


def test_a_version_is_made_again_from_nothing(promoted: Project) -> None:
    """Its data from the project's cache, everything else computed: the same bytes. The project is left alone."""
    before = promoted.lock(), (promoted.root / "params.yaml").read_text()
    output = promoted.rlhf("reproduce", "2")
    ran = [line.split()[1] for line in output.splitlines() if line.startswith("✓") and line.split()[2] == "ran"]
    assert ran == ["base_model", "collect", "prepare", "sft", "preferences", CHAMPION]
    assert (promoted.lock(), (promoted.root / "params.yaml").read_text()) == before
    assert left_over(promoted) == []


def test_weights_that_differ_are_reported(promoted: Project) -> None:
    database = sqlite3.connect(promoted.root / "mlflow.db")
    md5 = registered(promoted)[2]["weights"][f"{CHAMPION}/adapter"]
    change = "update model_version_tags set value = replace(value, ?, 'other.dir') where key = 'weights'"
    with database:
        database.execute(change, [md5])
    database.close()
    output = promoted.rlhf("reproduce", "2", expect=1)
    table = {words[0]: words[-1] for words in map(str.split, output.splitlines()) if words[-1:] in (["yes"], ["no"])}
    assert table == {"base_model/model": "yes", "sft/adapter": "yes", f"{CHAMPION}/adapter": "no"}
    assert "docs/reproducibility.md" in output
    assert left_over(promoted) == []


def test_an_interrupted_reproduction_leaves_nothing(promoted: Project) -> None:
    command = promoted.start("reproduce", "1")
    wait_for(lambda: any((promoted.root / ".rlhf" / "reproduce").glob("*/artifacts/*/*")))
    os.killpg(command.pid, signal.SIGINT)
    output, _ = command.communicate(timeout=PATIENCE)
    assert command.returncode == 130, output
    assert "interrupted" in output
    assert left_over(promoted) == []


def left_over(project: Project) -> list[str]:
    """Worktrees beside the project itself, and what lies in their place."""
    return [*project.worktrees(), *(path.name for path in (project.root / ".rlhf").glob("reproduce/*"))]
