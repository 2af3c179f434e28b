"""Early stopping of Hugging Face trainers on held-out loss; the best weights are kept."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasks.core import distributed
from tasks.models import hf_training

__all__ = ["EarlyStopping", "early_stopping"]


def early_stopping(patience: int | None) -> tuple[dict[str, Any], list[TrainerCallback]]:
    """Trainer arguments and callbacks of early stopping; none without a patience."""
    if patience is None:
        return {}, []
    return {"eval_strategy": "steps", "eval_steps": hf_training.CHECKPOINT_STEPS}, [EarlyStopping(patience)]


class EarlyStopping(TrainerCallback):
    """Ends training after `patience` evaluations in a row without a lower held-out loss, and restores the best weights.

    Which evaluation was the best follows from the trainer's log, which is part of its checkpoints. The weights lie in a
    file beside these. An interrupted run computes what followed its checkpoint again, so it writes the same file.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        if not state.global_step:
            return  # before the training, whose interrupted run may have left its best weights
        best = losses.index(min(losses))
        if best == len(losses) - 1:
            path, weights = _best_weights(args), _trainable(model)
            save_file(
                {name: weight.detach().contiguous() for name, weight in weights.items()}, path.with_suffix(".tmp")
            )
            path.with_suffix(".tmp").replace(path)
        elif len(losses) - 1 - best >= self._patience:
            control.should_training_stop = True
            control.should_save = False  # a run that went on from here would take another step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        parameters = _trainable(model)
        for name, weight in load_file(_best_weights(args)).items():
            parameters[name].data.copy_(weight)


def _trainable(model: Any) -> dict[str, Tensor]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _best_weights(args: TrainingArguments) -> Path:
    """The file of the best weights; every rank has its own, for they need not share a folder."""
    return Path(str(args.output_dir)) / f"best_{distributed.rank()}.safetensors"
