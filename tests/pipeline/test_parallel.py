"""Stages side by side, each in a process of its own: the same result, and no process outlives the run."""

import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.pipeline.conftest import PATIENCE, STAGES, Project, device_limit, wait_for

pytestmark = pytest.mark.slow


def test_side_by_side_gives_what_one_after_another_gives(fresh: Project, finished: Project) -> None:
    output = fresh.rlhf("run", "--parallel", "2")
    assert sorted(fresh.ran()) == sorted(STAGES)
    locks = [YAML(typ="safe").load(project.lock()) for project in (fresh, finished)]
    assert locks[0] == locks[1], "but for the order in which the stages were done"
    assert output.count("✓") == 4
    assert fresh.rlhf("run", "--parallel", "2").count("cached") == 4
    assert fresh.rlhf("run").count("cached") == 4
    assert fresh.ran() == []


def test_branches_overlap(project: Project) -> None:
    """Each of the last two stages waits until the other one runs as well."""
    (project.root / ".rlhf" / "meet").touch()
    project.edit("params.yaml", "seed: 0", "seed: 1")
    project.rlhf("run", "--parallel", "2")
    assert sorted(project.ran()) == sorted(STAGES)


def test_a_limit_of_devices_holds_across_branches(project: Project) -> None:
    """Prefect's global limit, as `rlhf up` makes it: whoever computes on the device holds it, all others wait."""
    (project.root / ".rlhf" / "sleep").write_text("3")
    (project.root / ".rlhf" / "trace").unlink()
    project.edit("params.yaml", "seed: 0", "seed: 1")
    with device_limit(project):
        output = project.rlhf("run", "--parallel", "2")
    assert "waiting for the device" in output
    assert "ERROR" not in output
    first, *others = (project.root / ".rlhf" / "trace").read_text().splitlines()[4:]
    assert others[0] == first.replace("begins", "ends")
    assert len(others) == 3


def test_a_limit_of_devices_holds_across_projects(project: Project, finished: Project, tmp_path: Path) -> None:
    """Two projects of one Prefect server, told by one trace."""
    projects = [project, finished.copy(tmp_path / "other")]
    trace = tmp_path / "trace"
    for one in projects:
        (one.root / ".rlhf" / "sleep").write_text("2")
        (one.root / ".rlhf" / "trace").unlink()
        (one.root / ".rlhf" / "trace").symlink_to(trace)
        one.edit("params.yaml", "seed: 0", "seed: 1")
    with device_limit(project):
        processes = [one.start("run") for one in projects]
        output = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], output
    lines = [line for line in trace.read_text().splitlines() if line.split()[0] in ("sft", "gold_judge")]
    begun, ended = lines[::2], lines[1::2]
    assert [line.replace("ends", "begins") for line in ended] == begun, "two stages computed at once"
    assert sorted(begun) == ["gold_judge begins"] * 2 + ["sft begins"] * 2
    assert any("waiting for the device" in words for words in output), "the projects never met"


@pytest.mark.fault("a stage fails beside another", "the other one is finished and kept")
def test_a_failed_branch_lets_the_other_finish_and_is_reported(project: Project) -> None:
    (project.root / ".rlhf" / "sft.fails").touch()
    project.edit("params.yaml", "seed: 0", "seed: 1")
    assert "the toy was told to fail" in project.rlhf("run", "--parallel", "2", expect=1)
    (project.root / ".rlhf" / "sft.fails").unlink()
    project.ran()
    project.rlhf("run")
    assert project.ran() == ["sft"], "the other branch was finished and kept"


@pytest.mark.fault("a stage hangs", "ended at its time limit, and tried again from its checkpoint")
def test_a_stage_that_hangs_is_ended_and_tried_again(project: Project) -> None:
    (project.root / ".rlhf" / "sft.resumable").touch()
    project.edit("params.yaml", "epochs: 1", "epochs: 3")
    output = project.rlhf("run", "--timeout", "30", "--retries", "1")
    assert project.ran() == ["sft", "sft"]
    assert (project.root / ".rlhf" / "resumed").read_text() == "True", "the second try goes on from the checkpoint"
    assert "✓ sft" in output
    assert not project.processes()


def test_a_stage_that_hangs_for_good_is_one_message(project: Project) -> None:
    (project.root / ".rlhf" / "sleep").write_text("60")
    project.edit("params.yaml", "epochs: 1", "epochs: 3")
    output = project.rlhf("run", "--timeout", "3", expect=1)
    assert "sft was ended after 3 s, its time limit" in output
    assert not project.processes()
    assert "sft.epochs: 1 → 3" in project.rlhf("status")


def test_a_second_run_waits_and_then_finds_all_done(project: Project) -> None:
    """It must not change params.yaml under the first one's feet."""
    (project.root / ".rlhf" / "sleep").write_text("4")
    first = project.start("run", "-S", "sft.epochs=3")
    wait_for(lambda: "epochs: 3" in (project.root / "params.yaml").read_text())
    time.sleep(1)
    output = project.rlhf("run", "-S", "sft.epochs=4")
    assert "waiting for another run of this project" in output
    assert f"process {first.pid}" in output
    first.communicate(timeout=PATIENCE)
    assert first.returncode == 0
    assert project.ran() == ["sft", "sft"]
    assert "epochs: 4" in (project.root / "params.yaml").read_text()
