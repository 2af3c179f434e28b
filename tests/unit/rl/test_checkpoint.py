"""Checkpoints of an RL run that a disk, a hand or an attacker has damaged."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

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


def without_optimiser(file: Path) -> None:
    state = torch.load(file)
    del state["optimizer"]
    torch.save(state, file)


def other_weights(file: Path) -> None:
    state = torch.load(file)
    state["weights"] = {name: value[:1] for name, value in state["weights"].items()}
    torch.save(state, file)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut in half": (cut, "it is damaged"),
    "empty": (lambda file: file.write_bytes(b""), "it is damaged"),
    "no archive": (lambda file: file.write_bytes(b"cos\nsystem\n(S'touch ran'\ntR."), "it is damaged"),
    "a bit changed": (flip, "it is damaged"),
    "another thing": (lambda file: torch.save([1], file), "it is damaged"),
    "a part missing": (without_optimiser, "it is damaged"),
    "another model": (other_weights, "its weights have other names or shapes"),
    "hostile": (lambda file: torch.save(Hostile(), file), "refused, since it holds more than numbers and tensors"),
    "hostile inside": (
        lambda file: torch.save(torch.load(file) | {"history": Hostile()}, file),
        "refused, since it holds more than numbers and tensors",
    ),
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
    change, problem = DAMAGES[damage]
    change(folder / "ppo.pt")
    run, warnings = go_on(folder)
    assert warnings[0].startswith(f"warning: the checkpoint {folder / 'ppo.pt'} is passed over: {problem}")
    assert warnings[1] == f"goes on from update {BEFORE} of 4 (checkpoint of an interrupted run)"
    assert_same_run(run, whole)
    assert not (tmp_path / "ran").exists(), "nothing in it may be executed"


def test_a_checkpoint_that_is_gone_is_no_loss_while_there_is_the_one_before(
    interrupted: Path, whole: Any, tmp_path: Path
) -> None:
    """As a kill between the renaming of the two leaves them."""
    folder = Path(shutil.copytree(interrupted, tmp_path / "checkpoints"))
    (folder / "ppo.pt").unlink()
    run, warnings = go_on(folder)
    assert warnings[0] == f"goes on from update {BEFORE} of 4 (checkpoint of an interrupted run)"
    assert_same_run(run, whole)
    assert list(folder.iterdir()) == [], "a finished run leaves no checkpoint behind"


def test_without_a_whole_checkpoint_the_training_begins_anew(interrupted: Path, whole: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(interrupted, tmp_path / "checkpoints"))
    for file in folder.iterdir():
        cut(file)
    run, warnings = go_on(folder)
    assert warnings[2] == "warning: no checkpoint is left, so the training begins anew"
    assert_same_run(run, whole)
