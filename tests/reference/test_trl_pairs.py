"""The losses of the stage dpo by TRL's trainers, on token ids, against their formulas: values and gradients."""

import warnings
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import Trainer

from tasks.config.training import DPOParams
from tasks.dpo import make_trainer, unpaired
from tests.conftest import letter_tokenizer, tiny_model

BETA, EPSILON, SIMPO_GAMMA = 0.3, 0.2, 0.5
ROWS = Dataset.from_list(
    [
        {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 2], "rejected_ids": [10, 2]},
        {"prompt_ids": [11], "chosen_ids": [12, 2], "rejected_ids": [13, 14, 15, 16, 2]},
        {"prompt_ids": [6, 7], "chosen_ids": [17, 18, 19, 20, 2], "rejected_ids": [5, 5, 2]},
    ]
)
SETTINGS: dict[str, dict[str, Any]] = {
    "sigmoid": {}, "hinge": {}, "ipo": {}, "robust": {"label_smoothing": EPSILON}, "kto": {}, "orpo": {},
    "simpo": {"label_smoothing": EPSILON, "trl": {"simpo_gamma": SIMPO_GAMMA}},
}  # fmt: skip


def trainer_of(loss_type: str) -> Trainer:
    """The trainer, with an adapter that is off the reference."""
    params = DPOParams(
        max_pairs=3, loss_type=loss_type, beta=BETA, epochs=1, batch_size=6, learning_rate=0.1, **SETTINGS[loss_type]
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        trainer = make_trainer(
            params, 0, ROWS, model=tiny_model(), peft_config=lora, processing_class=letter_tokenizer(), callbacks=[]
        )
    generator = torch.Generator().manual_seed(1)
    for name, weight in sorted(trainer.model.named_parameters()):
        if "lora_" in name:
            weight.data.normal_(std=0.3, generator=generator)
    return trainer


def token_logprobs(model: Any, ids: list[int]) -> Tensor:
    """log π of each token but the first, one sequence at a time and without padding."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    return torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


def response_logprobs(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    return token_logprobs(model, prompt + response)[len(prompt) - 1 :]


def log_ratio(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """log π(y|x) − log π_ref(y|x)."""
    with torch.no_grad(), model.disable_adapter():
        reference = response_logprobs(model, prompt, response).sum()
    return response_logprobs(model, prompt, response).sum() - reference


def pair_loss(loss_type: str, model: Any, row: dict[str, Any]) -> Tensor:
    prompt, chosen, rejected = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
    if loss_type == "simpo":
        means = [response_logprobs(model, prompt, side).mean() for side in (chosen, rejected)]
        margin = BETA * (means[0] - means[1]) - SIMPO_GAMMA
        return -(1 - EPSILON) * logsigmoid(margin) - EPSILON * logsigmoid(-margin)
    ratios = [log_ratio(model, prompt, side) for side in (chosen, rejected)]
    margin = BETA * (ratios[0] - ratios[1])
    if loss_type == "sigmoid":
        return -logsigmoid(margin)
    if loss_type == "hinge":
        return (1 - margin).clamp_min(0)
    if loss_type == "robust":
        return -((1 - EPSILON) * logsigmoid(margin) - EPSILON * logsigmoid(-margin)) / (1 - 2 * EPSILON)
    return (ratios[0] / len(chosen) - ratios[1] / len(rejected) - 1 / (2 * BETA)) ** 2


def orpo_loss(model: Any) -> Tensor:
    """The negative log-likelihood of the chosen texts, less β · log σ(log odds of chosen over rejected)."""
    texts = [token_logprobs(model, row["prompt_ids"] + row["chosen_ids"]) for row in ROWS]
    odds = []
    for row in ROWS:
        means = [
            response_logprobs(model, row["prompt_ids"], row[side]).mean() for side in ("chosen_ids", "rejected_ids")
        ]
        odds.append(logsigmoid(torch.logit(means[0].exp()) - torch.logit(means[1].exp())))
    return -torch.cat(texts).mean() - BETA * torch.stack(odds).mean()


def kto_loss(model: Any) -> Tensor:
    """1 − σ(β(r − z)) of chosen and 1 − σ(β(z − r)) of rejected responses, z the mean of mismatched log-ratios."""
    rows = list(unpaired(ROWS, 0, 6))
    mismatched = [log_ratio(model, row["prompt_ids"], row["KL_completion_ids"]) for row in rows]
    baseline = torch.stack(mismatched).mean().detach().clamp_min(0)
    losses = []
    for row in rows:
        sign = 1 if row["label"] else -1
        gain = log_ratio(model, row["prompt_ids"], row["completion_ids"]) - baseline
        losses.append(1 - torch.sigmoid(sign * BETA * gain))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("loss_type", SETTINGS)
def test_loss_and_gradient(loss_type: str) -> None:
    trainer = trainer_of(loss_type)
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    found = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    gradients = torch.autograd.grad(found, weights)
    if loss_type in ("orpo", "kto"):
        expected = (orpo_loss if loss_type == "orpo" else kto_loss)(trainer.model)
    else:
        expected = torch.stack([pair_loss(loss_type, trainer.model, row) for row in ROWS]).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert max(gradient.abs().max() for gradient in gradients) > 1e-3
    for gradient, other in zip(gradients, torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-5)


def test_kto_rows_hold_each_response_once_and_the_response_before_it() -> None:
    rows = list(unpaired(ROWS, 0, 4))
    labelled = {(tuple(row["prompt_ids"]), tuple(row["completion_ids"]), row["label"]) for row in rows}
    assert labelled == {
        (tuple(row["prompt_ids"]), tuple(row[side]), side == "chosen_ids")
        for row in ROWS
        for side in ("chosen_ids", "rejected_ids")
    }
    ids = [row["completion_ids"] for row in rows]
    assert [row["KL_completion_ids"] for row in rows] == [ids[3], *ids[:3], ids[5], ids[4]]
    assert ids != [row["completion_ids"] for row in unpaired(ROWS, 1, 4)], "the order follows from the seed"
