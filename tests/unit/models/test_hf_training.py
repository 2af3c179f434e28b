"""What a Hugging Face trainer of ours stops on."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tasks.core import tracking
from tasks.core.errors import TrainingError
from tasks.models import hf_training
from tasks.models.hf_training import HistoryCallback, PolicySnapshots, trainer_arguments


class InfiniteLoss(nn.Module):
    """Its loss is infinite, its gradient is 1, and so is the norm that the trainer logs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.weight.sum() + float("inf") + 0 * x.sum()}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's default is on
def test_a_loss_that_is_not_finite_stops_the_training_though_its_gradient_is() -> None:
    arguments = TrainingArguments(**trainer_arguments(seed=0, batch_size=2, learning_rate=0.1, epochs=1))
    rows = [{"x": torch.ones(1)} for _ in range(20)]
    trainer = Trainer(InfiniteLoss(), arguments, train_dataset=rows, callbacks=[HistoryCallback("sft")])
    with pytest.raises(TrainingError, match=r"step 1: loss or gradient is not finite: .*inf.*; lower learning_rate"):
        trainer.train()


def toy_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PolicySnapshots:
    """Snapshots of updates 2 and 4, taken beside a run's checkpoints; their adapter is one file."""

    def save(update: int, folder: Path) -> None:
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / "weights").write_text(f"update {update}")

    monkeypatch.setattr(hf_training, "save_adapter", save)
    with tracking.active_run(tracking.ActiveRun("ppo", checkpoints=tmp_path / "checkpoints")):
        snapshots = PolicySnapshots(2, tmp_path / "out")
    for update in range(1, 6):
        snapshots.save(update, update)  # type: ignore[arg-type]
    return snapshots


def test_a_damaged_snapshot_is_left_out_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshots = toy_snapshots(tmp_path, monkeypatch)
    (tmp_path / "checkpoints" / "policies" / "0004" / "adapter" / "weights").write_text("update 5")
    snapshots.publish()
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

    monkeypatch.setattr(hf_training.os, "fsync", fail)
    snapshot = tmp_path / "checkpoints" / "policies" / "0002"
    assert hf_training._find_damage(snapshot) is None
    with pytest.raises(OSError, match="no space"):
        hf_training._mark_complete(snapshot)
