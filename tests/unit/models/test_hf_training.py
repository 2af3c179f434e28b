"""What a Hugging Face trainer of ours stops on."""

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, get_scheduler
from trl import SFTConfig

from tasks.config.training import SFTParams
from tasks.core.errors import ConfigError, TrainingError
from tasks.models.hf_training import HistoryCallback, trainer_arguments, trainer_config
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
