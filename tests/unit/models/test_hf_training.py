"""What a Hugging Face trainer of ours stops on."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, get_scheduler
from trl import SFTConfig

from tasks.config.training import SFTParams
from tasks.core import tracking
from tasks.core.errors import ConfigError, TrainingError
from tasks.models import hf_training
from tasks.models.hf_training import HistoryCallback, PolicySnapshots, trainer_arguments, trainer_config
from tests.support.tiny_stages import _SFT as SFT

# TRL's default is on.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


class InfiniteLoss(nn.Module):
    """Its loss is infinite, its gradient is 1, and so is the norm that the trainer logs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.weight.sum() + float("inf") + 0 * x.sum()}


def test_a_loss_that_is_not_finite_stops_the_training_though_its_gradient_is() -> None:
    arguments = TrainingArguments(**trainer_arguments(SFT.model_copy(update={"batch_size": 2}), seed=0))
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


def arguments_of(**changes: object) -> TrainingArguments:
    params = SFTParams.model_validate(SFT.model_dump() | changes)
    return trainer_config(SFTConfig, params, "sft", **trainer_arguments(params, seed=0))


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    # Ten steps, the first two of them warmup: half of the peak and the peak; then 8 steps down to 0, or none.
    [("linear", [0.5, 1, 0.5]), ("cosine", [0.5, 1, 0.5]), ("constant", [0.5, 1, 1])],
)
def test_schedules_at_the_first_steps_and_half_way_down(scheduler: str, expected: list[float]) -> None:
    arguments = arguments_of(lr_scheduler=scheduler, warmup_share=0.2, weight_decay=0.25)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_scheduler(arguments.lr_scheduler_type, optimizer, arguments.get_warmup_steps(10), 10)
    rates = []
    for _ in range(7):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    assert [rates[0], rates[1], rates[5]] == pytest.approx(expected)
    assert arguments.weight_decay == 0.25


def test_options_of_trl_pass_through() -> None:
    assert arguments_of(trl={"max_grad_norm": 0.3, "adam_beta2": 0.95}).max_grad_norm == 0.3


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_grad_nrom": 0.3}, r"sft\.trl\.max_grad_nrom: SFTConfig has no such option; did you mean max_grad_norm"),
        ({"learning_rate": 0.3}, r"sft\.trl\.learning_rate: the stage sets it itself"),
        ({"optim": "none"}, r"sft\.trl: SFTConfig refuses \{'optim': 'none'\}: "),
    ],
)
def test_an_option_that_does_not_fit_is_named(options: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        arguments_of(trl=options)
