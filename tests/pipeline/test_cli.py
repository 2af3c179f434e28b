"""The `rlhf` command: what a person sees who asks too early, in the wrong place, or for what does not exist."""

import json
import re
import shutil
import sys
from importlib.metadata import version
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from flows.cli import console
from tasks.core.paths import project_root
from tests.pipeline.conftest import ROOT, Project, rlhf

POLICIES = {
    "sft": {"reward_proxy": 0.0, "reward_gold": 0.1, "win_rate": 0.5, "kl": 0.0, "length": 9.5},
    "ppo": {"reward_proxy": 1.234, "reward_gold": None, "win_rate": 0.75, "win_rate_low": 0.7, "win_rate_high": 0.801}
    | {"kl": 2.0, "length": 10.0, "more": 1},
}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show"], "no evaluation has finished yet; run `rlhf run`"),
        (["run", "--preset", "nope"], "no preset 'nope'"),
        (["run", "-S", "sft.epochs"], "write it as section.key=value"),
        (["run", "-S", "sft.epochs=0"], "sft.epochs: Input should be greater than 0, got 0"),
        (["run", "-S", "sft.epoch=1"], "sft.epoch: unknown key (value 1); did you mean epochs?"),
        (["run", "-S", "sft.epochs=2", "sfft"], "no stage 'sfft' in dvc.yaml; its stages are"),
    ],
)
def test_an_error_is_one_message_and_changes_nothing(fresh: Project, words: list[str], message: str) -> None:
    before = (fresh.root / "params.yaml").read_text()
    output = fresh.rlhf(*words, expect=1)
    assert message in output
    assert output.startswith("error:")
    assert (fresh.root / "params.yaml").read_text() == before


def test_the_version_is_that_of_the_package(fresh: Project) -> None:
    assert fresh.rlhf("--version") == f"rlhf {version('rlhf-pipeline')}\n"


def test_outside_a_project_it_says_so(fresh: Project, tmp_path: Path) -> None:
    environment = fresh.environment | {"PYTHONPATH": str(ROOT)}
    output = rlhf(fresh, "status", expect=1, cwd=tmp_path, env=environment)
    assert "no dvc.yaml at or above" in output


def test_in_another_worktree_it_refuses_to_run_this_ones_code(fresh: Project) -> None:
    code = f"import sys; sys.path[0] = {str(ROOT)!r}; from flows.cli.main import main; main()"
    output = fresh.command(sys.executable, "-c", code, "status", expect=1)
    assert f"this is the rlhf command of {ROOT}" in output.replace("\n", " ")


def test_show_prints_the_figures_as_they_are_written(fresh: Project) -> None:
    folder = fresh.root / "artifacts" / "evaluate"
    folder.mkdir(parents=True)
    controls = {"null": {"win_rate": 0.51, "win_rate_low": 0.45, "win_rate_high": 0.57, "kl": 0.0, "length": 9.0}}
    policies = POLICIES | {"ppo": POLICIES["ppo"] | {"win_rate_bound": 0.6, "win_rate_length_controlled": 0.7}}
    (folder / "policies.json").write_text(json.dumps(policies))
    (folder / "controls.json").write_text(json.dumps(controls))
    assert json.loads(fresh.rlhf("show", "--json")) == policies | controls
    shown = fresh.rlhf("show").splitlines()
    first, second = ([re.split(" {2,}", line.strip()) for line in shown if name in line] for name in ("ppo", "null"))
    assert first[:2] == [
        ["ppo", "1.23", "–", "75% (70%–80%)", "2.00", "10.0"],
        ["ppo", "75% (70%–80%)", "70%", "–", "–", "60%"],
    ]
    assert second == [["null", "–", "–", "51% (45%–57%)", "0.00", "9.0"], ["null", "51% (45%–57%)", "–", "–", "–", "–"]]


def test_a_narrow_terminal_loses_nothing_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    output = StringIO()
    monkeypatch.setattr(console, "console", Console(file=output, width=40))
    console.print_table(console.policies_table(POLICIES, {}))
    assert max(map(len, output.getvalue().splitlines())) == 40
    assert "…" not in output.getvalue()


@pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # DVC 3.67 with pygtrie 2.6
def test_the_graph_of_this_project_is_read_from_dvc_yaml() -> None:
    from tasks.runtime import dvc_stages

    assert project_root() == ROOT
    graph = dvc_stages.graph()
    assert set(graph["dpo"]) == {"base_model", "sft", "preferences"}
    assert set(graph["sft"]) == {"base_model", "prepare"}
    names = list(graph)
    assert all(names.index(need) < names.index(name) for name, needs in graph.items() for need in needs)


def test_the_private_parts_of_dvc_are_where_we_take_them_from() -> None:
    """If one is gone, DVC has changed: look at dvc_stages.py and dvc_repo.py before loosening the pin."""
    import inspect

    import dvc.stage.cache
    import dvc.stage.run

    assert list(inspect.signature(dvc.stage.run.cmd_run).parameters) == ["stage", "dry", "run_env"]
    source = inspect.getsource(dvc.stage.run.run_stage)
    assert "cmd_run(stage, dry=dry, run_env=run_env)" in source.replace("run(stage", "cmd_run(stage")
    for function in (dvc.stage.cache._get_stage_hash, dvc.stage.cache._can_hash):
        assert list(inspect.signature(function).parameters) == ["stage"]


def test_many_reasons_are_cut_short() -> None:
    assert console._shorten(["a", "b", "c", "d", "e"]) == "a; b; c; and 2 more"


def test_a_judge_of_pairs_has_columns_only_where_it_judged() -> None:
    plain = {str(column.header) for column in console.policies_table(POLICIES, {}).columns}
    pairs = {"win_rate_judge": 0.625, "win_rate_judge_low": 0.5, "win_rate_judge_high": 0.75, "judge_inconsistent": 0.2}
    judged = console.policies_table(POLICIES | {"ppo": POLICIES["ppo"] | pairs}, {})
    cells = {str(column.header): list(column.cells) for column in judged.columns}
    assert cells.keys() - plain == {"LLM judge", "contradictions"}
    assert (cells["LLM judge"], cells["contradictions"]) == (["–", "62% (50%–75%)"], ["–", "20%"])
    assert cells["win rate v. SFT"] == ["–", "75% (70%–80%)"]


PLAIN_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "ascii"}, PLAIN_LOCALE], ids=["ascii", "C"])
def test_where_the_output_knows_no_tick_and_no_arrow_a_run_prints_others(
    project: Project, variables: dict[str, str]
) -> None:
    """The commands, and a stage that is run alone; a person's files may have any name."""
    project.edit("params.yaml", "epochs: 1", "epochs: 3")
    (project.root / "donn\u00e9es.txt").touch()
    plain = project.environment | variables
    assert "sft.epochs: 1 -> 3" in rlhf(project, "status", env=plain)
    output = rlhf(project, "run", env=plain)
    assert re.search("^> sft +running +sft.epochs: 1 -> 3$", output, re.MULTILINE)
    assert re.search("^ok sft +ran ", output, re.MULTILINE)
    assert output.isascii()
    failing = {**plain, "PYTHONPATH": str(project.root)}
    (project.root / ".rlhf" / "sft.fails").touch()
    shutil.rmtree(project.root / "artifacts" / "sft")
    assert "sft: the toy was told to fail" in project.command(sys.executable, "-m", "tasks.sft", expect=1, env=failing)


def test_it_works_from_a_folder_inside_the_project(finished: Project) -> None:
    environment = finished.environment | {"PYTHONPATH": str(finished.root)}
    assert "up to date" in rlhf(finished, "status", cwd=finished.root / "tasks" / "core", env=environment)
