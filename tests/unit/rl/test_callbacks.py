"""Snapshots of the policy during training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.core import tracking
from tasks.models import checkpoints
from tasks.rl import callbacks
from tasks.rl.callbacks import SnapshotCallback


def toy_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SnapshotCallback:
    """Snapshots of updates 2 and 4, taken beside a run's checkpoints; their adapter is one file."""

    def save(model: Any, folder: Path) -> None:
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / "weights").write_text(f"update {model.update}")

    model: Any = SimpleNamespace()

    monkeypatch.setattr(callbacks, "save_weights", save)
    with tracking.active_run(tracking.ActiveRun("ppo", checkpoints=tmp_path / "checkpoints")):
        snapshots = SnapshotCallback(model, 2, tmp_path / "out")
    for model.update in range(1, 6):
        snapshots.on_update_end(model.update)
    return snapshots


def test_a_damaged_snapshot_is_left_out_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshots = toy_snapshots(tmp_path, monkeypatch)
    (tmp_path / "checkpoints" / "policies" / "0004" / "adapter" / "weights").write_text("update 5")
    snapshots.on_train_end()
    published = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path / "out").as_posix(): path.read_text() for path in published} == {
        "policies/0002/adapter/weights": "update 2"
    }
    assert "0004 is left out: adapter/weights in it is missing or damaged" in capsys.readouterr().err


def test_a_file_that_the_disk_did_not_take_is_an_error_and_reading_forces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_snapshots(tmp_path, monkeypatch)

    def fail(_file: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(checkpoints.os, "fsync", fail)
    snapshot = tmp_path / "checkpoints" / "policies" / "0002"
    assert checkpoints.find_damage(snapshot) is None
    with pytest.raises(OSError, match="no space"):
        checkpoints.mark_complete(snapshot)
