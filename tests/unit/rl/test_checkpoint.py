"""Checkpoints of an RL run that a disk, a hand or an attacker has damaged."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.core.errors import TrainingError
from tasks.models.checkpoints import COMPLETE_MARKER, find_damage, mark_complete
from tests.support.tiny_trainer import Recorder, assert_same_weights, trainer, weights

BEFORE, LAST = 2, 3
"""The two checkpoints of a run that is interrupted in its last update of four."""


class Hostile:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    """One bit of a weight."""
    content = bytearray(file.read_bytes())
    weight = next(iter(torch.load(file)["weights"].values())).numpy().tobytes()
    content[content.index(weight)] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut in half": (lambda folder: cut(folder / "state.pt"), "state.pt in it is missing or damaged"),
    "gone": (lambda folder: (folder / "state.pt").unlink(), "state.pt in it is missing or damaged"),
    "a bit changed": (lambda folder: flip(folder / "state.pt"), "state.pt in it is missing or damaged"),
    "hostile": (lambda folder: torch.save(Hostile(), folder / "state.pt"), "state.pt in it is missing or damaged"),
    "killed while it was written": (lambda folder: (folder / COMPLETE_MARKER).unlink(), "it is not complete"),
}


@pytest.fixture(scope="module")
def whole() -> Any:
    run = trainer()
    run.train()
    return run


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of updates 2 and 3."""
    folder = tmp_path_factory.mktemp("checkpoints")
    run = trainer(checkpoints=folder, checkpoint_every=1)
    sample = run.sample

    def interrupt() -> Any:
        if run.updates_done == LAST:
            raise KeyboardInterrupt
        return sample()

    run.sample = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.train()
    return folder


def go_on(folder: Path) -> tuple[Any, list[str]]:
    """The run that goes on, and its warnings."""
    recorder = Recorder()
    run = trainer(checkpoints=folder, recorder=recorder)
    run.train()
    return run, recorder.warnings


def assert_same_run(run: Any, whole: Any) -> None:
    assert run.history == whole.history
    assert run.samples == whole.samples
    assert_same_weights(run, weights(whole))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    damage: str, interrupted: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(interrupted, tmp_path / "checkpoints"))
    newest = folder / f"checkpoint-{LAST}"
    change, problem = DAMAGES[damage]
    change(newest)
    run, warnings = go_on(folder)
    assert warnings[0] == f"warning: the checkpoint {newest} is passed over: {problem}"
    assert warnings[1] == f"goes on from update {BEFORE} of 4 (checkpoint of an interrupted run)"
    assert_same_run(run, whole)
    assert not (tmp_path / "ran").exists(), "nothing in it may be executed"


def test_without_a_whole_checkpoint_the_training_begins_anew_and_keeps_its_own(
    interrupted: Path, whole: Any, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(interrupted, tmp_path / "checkpoints"))
    for checkpoint in folder.iterdir():
        cut(checkpoint / "state.pt")
    recorder = Recorder()
    run = trainer(checkpoints=folder, recorder=recorder, checkpoint_every=1)
    run.train()
    assert recorder.warnings[2] == f"warning: no checkpoint is left in {folder}, so the training begins anew"
    assert_same_run(run, whole)
    assert [find_damage(folder / f"checkpoint-{update}") for update in (BEFORE, LAST)] == [None, None]
    assert len(list(folder.iterdir())) == 2


def test_a_hostile_checkpoint_with_a_good_mark_is_refused_in_one_message(
    interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(interrupted, tmp_path / "checkpoints"))
    newest = folder / f"checkpoint-{LAST}"
    torch.save(torch.load(newest / "state.pt") | {"history": Hostile()}, newest / "state.pt")
    mark_complete(newest)
    with pytest.raises(TrainingError, match=r"checkpoint-3 holds more than numbers and tensors.*delete it"):
        go_on(folder)
    assert not (tmp_path / "ran").exists()
