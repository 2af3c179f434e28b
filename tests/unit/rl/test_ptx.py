"""PPO-ptx: the gradient of demonstrations beside that of PPO."""

import dataclasses

import pytest
import torch
from torch import Tensor

from tasks.core.errors import ModelError
from tasks.core.rows import Demonstration
from tasks.rl.ptx import Demonstrations
from tasks.rl.update import PolicyUpdate
from tests.support.tiny_trainer import PARAMS, NumberTokenizer, assert_same_weights, experience_of, trainer, weights

ROWS = [Demonstration(id=str(row), prompt="3 4", response=f"{5 + row} 6 7"[: 1 + 2 * row]) for row in range(3)]
COEF = 0.5


def gradients(run) -> dict[str, Tensor]:
    return {
        name: weight.grad.clone()
        for name, weight in run.policy.trainable_parameters().items()
        if weight.grad is not None
    }


def updater(run, coef: float = COEF, rows=ROWS) -> PolicyUpdate:
    demonstrations = Demonstrations(rows, NumberTokenizer(), run.policy.model, coef)
    return PolicyUpdate(run.policy, run.algorithm, demonstrations)


def test_without_advantages_the_gradient_is_the_scaled_one_of_sft() -> None:
    """By transformers' own loss of the same rows, one after another, whatever the size of the micro-batches."""
    run = trainer(PARAMS, advantage="return", max_grad_norm=1e9)
    experience, _ = experience_of(run)
    silent = dataclasses.replace(experience, advantages=torch.zeros_like(experience.advantages))
    update = updater(run)
    update.optimizer.step = lambda: None
    drawn = update.demonstrations.draw(len(silent), torch.Generator().manual_seed(0))
    metrics = update.step(silent, drawn)
    found = gradients(run)

    run.policy.zero_grad()
    count, total = drawn.response_mask.sum(), 0.0
    for row in range(len(drawn)):
        prompt = drawn.prompts[row][drawn.prompt_mask[row]]
        response = drawn.responses[row][drawn.response_mask[row]]
        labels = torch.cat([torch.full_like(prompt, -100), response])[None]
        loss = (
            run.policy.model(input_ids=torch.cat([prompt, response])[None], labels=labels).loss * len(response) / count
        )
        (COEF * loss).backward()
        total += loss.item()
    assert metrics["ptx_loss"] == pytest.approx(total, rel=1e-5)
    for name, gradient in gradients(run).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
    assert any(gradient.abs().max() > 1e-3 for gradient in found.values())


def test_the_gradients_add_up() -> None:
    run = trainer(PARAMS, max_grad_norm=1e9)
    experience, _ = experience_of(run)
    update = updater(run)
    update.optimizer.step = lambda: None
    drawn = update.demonstrations.draw(len(experience), torch.Generator().manual_seed(0))
    update.step(experience)
    alone = gradients(run)
    update.step(experience, drawn)
    both = gradients(run)
    silent = dataclasses.replace(
        experience,
        advantages=torch.zeros_like(experience.advantages),
        returns=experience.old_values,
        old_values=experience.old_values,
    )
    update.step(silent, drawn)
    for name, gradient in gradients(run).items():
        torch.testing.assert_close(both[name], alone[name] + gradient, rtol=1e-4, atol=1e-6)


def test_a_weight_of_zero_changes_no_bit_and_a_training_with_demonstrations_learns_them() -> None:
    plain = trainer(PARAMS)
    plain.train()
    taught = trainer(PARAMS)
    taught.updater = updater(taught)
    taught.train()
    assert "ptx_loss" not in plain.history[-1]
    losses = [row["ptx_loss"] for row in taught.history]
    assert losses[-1] < losses[0]
    again = trainer(PARAMS)
    again.train()
    assert_same_weights(again, weights(plain))


def test_demonstrations_are_drawn_with_their_end_token_and_none_is_longer_than_the_context() -> None:
    run = trainer(PARAMS)
    tokenizer = NumberTokenizer()
    run.policy.model.config.max_position_embeddings = 6
    long = Demonstration(id="long", prompt="3 4", response="5 6 7 8")
    drawn = updater(run, rows=[*ROWS[:1], long]).demonstrations.draw(8, torch.Generator().manual_seed(0))
    assert drawn.response_mask.sum(1).unique().tolist() == [drawn.response_mask.shape[1]], "the long one is left out"
    assert (drawn.responses[:, -1] == tokenizer.eos_token_id).all()
    with pytest.raises(ModelError, match=r"no demonstration fits .* 6 tokens: set ppo\.ptx_coef to 0"):
        updater(run, rows=[long])
