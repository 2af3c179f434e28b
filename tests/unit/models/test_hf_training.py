"""What a Hugging Face trainer of ours stops on."""

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tasks.core.errors import TrainingError
from tasks.models.hf_training import HistoryCallback, trainer_arguments
from tests.support.tiny_stages import _SFT as SFT


class InfiniteLoss(nn.Module):
    """Its loss is infinite, its gradient is 1, and so is the norm that the trainer logs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.weight.sum() + float("inf") + 0 * x.sum()}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's default is on
def test_a_loss_that_is_not_finite_stops_the_training_though_its_gradient_is() -> None:
    arguments = TrainingArguments(**trainer_arguments(SFT.model_copy(update={"batch_size": 2}), seed=0))
    rows = [{"x": torch.ones(1)} for _ in range(20)]
    trainer = Trainer(InfiniteLoss(), arguments, train_dataset=rows, callbacks=[HistoryCallback("sft")])
    with pytest.raises(TrainingError, match=r"step 1: loss or gradient is not finite: .*inf.*; lower learning_rate"):
        trainer.train()
