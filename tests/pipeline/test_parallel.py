"""Stages side by side, each in a process of its own: the same result, and no process outlives the run."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from ruamel.yaml import YAML

from flows.services import DEVICE_LIMIT

if TYPE_CHECKING:
    from tests.pipeline.conftest import Project


def test_side_by_side_gives_what_one_after_another_gives(fresh: Project, finished: tuple[Project, str]) -> None:
    said = fresh.rlhf("run", "--parallel", "2")
    assert sorted(fresh.ran()) == ["collect", "gold_judge", "prepare", "sft"]
    locks = [YAML(typ="safe").load(project.lock()) for project in (fresh, finished[0])]
    assert locks[0] == locks[1], "but for the order in which the stages were done"
    assert said.count("✓") == 4
    assert fresh.rlhf("run", "--parallel", "2").count("cached") == 4
    assert fresh.rlhf("run").count("cached") == 4
    assert fresh.ran() == []


def test_branches_overlap(project: Project) -> None:
    """Each of the last two stages waits until the other one runs as well."""
    (project.root / ".rlhf" / "meet").touch()
    project.edit("params.yaml", "seed: 0", "seed: 1")
    project.rlhf("run", "--parallel", "2")
    assert sorted(project.ran()) == ["collect", "gold_judge", "prepare", "sft"]


def test_a_limit_of_devices_holds_across_branches(project: Project) -> None:
    """Prefect's global limit, as `rlhf up` makes it: whoever computes on the device holds it, all others wait."""
    (project.root / ".rlhf" / "sleep").write_text("3")
    (project.root / ".rlhf" / "trace").unlink()
    project.edit("params.yaml", "seed: 0", "seed: 1")
    server = temporary_settings({PREFECT_API_URL: project.environment["PREFECT_API_URL"]})
    with server, get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(DEVICE_LIMIT, 1)
        try:
            said = project.rlhf("run", "--parallel", "2")
        finally:
            client.delete_global_concurrency_limit_by_name(DEVICE_LIMIT)
    assert "waiting for the device" in said
    first, *others = (project.root / ".rlhf" / "trace").read_text().splitlines()[4:]
    assert others[0] == first.replace("begins", "ends")
    assert len(others) == 3


def test_a_failed_branch_lets_the_other_finish_and_is_reported(project: Project) -> None:
    (project.root / ".rlhf" / "sft.fails").touch()
    project.edit("params.yaml", "seed: 0", "seed: 1")
    said = project.rlhf("run", "--parallel", "2", expect=1)
    assert "the toy was told to fail" in said
    assert "Traceback" not in said
    (project.root / ".rlhf" / "sft.fails").unlink()
    project.ran()
    project.rlhf("run")
    assert project.ran() == ["sft"], "the other branch was finished and kept"


def test_a_stage_that_hangs_is_ended_and_tried_again(project: Project) -> None:
    (project.root / ".rlhf" / "sft.resumable").touch()
    project.edit("params.yaml", "epochs: 1", "epochs: 3")
    said = project.rlhf("run", "--timeout", "5", "--retries", "1")
    assert project.ran() == ["sft", "sft"]
    assert (project.root / ".rlhf" / "resumed").read_text() == "True", "the second try goes on from the checkpoint"
    assert "✓ sft" in said
    assert not project.processes()


def test_a_stage_that_hangs_for_good_is_one_message(project: Project) -> None:
    (project.root / ".rlhf" / "sleep").write_text("60")
    project.edit("params.yaml", "epochs: 1", "epochs: 3")
    said = project.rlhf("run", "--timeout", "3", expect=1)
    assert "sft was ended after 3 s, its time limit" in said
    assert not project.processes()
    assert "sft.epochs: 1 → 3" in project.rlhf("status")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_stage_outlives_its_run(project: Project, number: signal.Signals) -> None:
    (project.root / ".rlhf" / "sft.resumable").touch()
    project.edit("params.yaml", "epochs: 1", "epochs: 3")
    process = project.start("run", "--parallel", "2")
    project.wait_for(".rlhf/waiting")
    os.kill(process.pid, number)
    process.communicate(timeout=60)
    project.wait_until(lambda: not project.processes())
    project.ran()
    project.rlhf("run")
    assert project.ran() == ["sft"]
    assert (project.root / ".rlhf" / "resumed").read_text() == "True"


def test_a_second_run_waits_and_then_finds_all_done(project: Project) -> None:
    """It must not change params.yaml under the first one's feet."""
    (project.root / ".rlhf" / "sleep").write_text("4")
    first = project.start("run", "-S", "sft.epochs=3")
    project.wait_until(lambda: "epochs: 3" in (project.root / "params.yaml").read_text())
    time.sleep(1)
    said = project.rlhf("run", "-S", "sft.epochs=4")
    assert "waiting for another run of this project" in said
    assert f"process {first.pid}" in said
    first.communicate(timeout=60)
    assert first.returncode == 0
    assert project.ran() == ["sft", "sft"]
    assert "epochs: 4" in (project.root / "params.yaml").read_text()
