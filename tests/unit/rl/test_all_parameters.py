"""PPO in all parameters of a model, with a frozen model as reference."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tasks.config.training import GenerationParams
from tasks.rl.ppo import PPOExperience
from tasks.rl.trainer import RLTrainer
from tests.conftest import tiny_model
from tests.support.tiny_trainer import PARAMS, Recorder, assert_same_weights, gradients, low_tokens, trainer_of, weights

TEMPERATURE = 0.7
CLIP, VALUE_CLIP, VALUE_COEF = 0.2, 0.2, 0.1  # as in PARAMS


def full_trainer(checkpoints: Path | None = None, recorder: Recorder | None = None, **changes: object) -> RLTrainer:
    torch.manual_seed(0)
    params = PARAMS.model_copy(update={"learning_rate": 1e-3} | changes)
    model, reference = tiny_model().requires_grad_(True), tiny_model()
    generation = GenerationParams(max_new_tokens=8, temperature=TEMPERATURE)
    return trainer_of(
        params, model, low_tokens, generation=generation, reference=reference, checkpoints=checkpoints,
        recorder=recorder,
    )  # fmt: skip


def shake(run: RLTrainer) -> None:
    """Move the policy and its value head away from what has sampled."""
    draw = torch.Generator().manual_seed(1)
    for weight in run.policy.trainable_parameters().values():
        weight.data += 0.03 * torch.randn(weight.shape, generator=draw)


def plain_loss(run: RLTrainer, experience: PPOExperience) -> tuple[Tensor, dict[str, Tensor], list[float]]:
    """The loss of PPO in float64, response by response without padding; the parameters, and the ratios."""
    policy = copy.deepcopy(run.policy).double()
    policy.model.set_attn_implementation("eager")
    total, ratios, count = torch.zeros((), dtype=torch.float64), list[float](), int(experience.response_mask.sum())
    for row in range(len(experience)):
        prompt = experience.prompts[row][experience.prompt_mask[row]]
        response = experience.responses[row][experience.response_mask[row]]
        out = policy.model(torch.cat([prompt, response])[None], output_hidden_states=True)
        states = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        logprobs = torch.log_softmax(out.logits[0, states] / TEMPERATURE, dim=-1)[range(len(response)), response]
        values = (out.hidden_states[-1][0, states] @ policy.value_head.weight[0]) + policy.value_head.bias
        columns = (experience.old_logprobs, experience.advantages, experience.old_values, experience.returns)
        for place, (logprob, value) in enumerate(zip(logprobs, values, strict=True)):
            old_logprob, advantage, old_value, target = (column[row, place].double() for column in columns)
            ratio = torch.exp(logprob - old_logprob)
            gain = torch.min(ratio * advantage, torch.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage)
            near = old_value + torch.clip(value - old_value, -VALUE_CLIP, VALUE_CLIP)
            error = torch.max((value - target) ** 2, (near - target) ** 2)
            total = total + (-gain + VALUE_COEF * error / 2) / count
            ratios.append(ratio.item())
    return total, policy.trainable_parameters(), ratios


def test_every_parameter_has_the_gradient_of_ppos_loss() -> None:
    """Against autograd through a plain forward pass of each response; micro-batches of five are uneven."""
    run = full_trainer(micro_batch_size=5, max_grad_norm=1e9)
    experience, _ = run.algorithm.compute_advantages(run.score(run.sample()))
    shake(run)
    loss, parameters, ratios = plain_loss(run, experience)
    clipped = sum(abs(ratio - 1) > CLIP for ratio in ratios)
    assert 0.1 < clipped / len(ratios) < 0.9, "the example must have clipped and free tokens"
    expected = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    run.updater.step(experience)
    found = gradients(run)
    own = {name for name, _ in run.policy.named_parameters() if not name.startswith("reference.")}
    assert found.keys() == expected.keys() == own
    for name, gradient in found.items():
        assert expected[name].abs().max() > 1e-6, f"no gradient reaches {name}"
        tolerance = 2e-5 * expected[name].abs().max().item()
        torch.testing.assert_close(gradient.double(), expected[name], rtol=0, atol=tolerance)


def test_the_reference_is_the_model_beside_it_and_stays() -> None:
    run = full_trainer()
    rollout = run.sample()
    before = run.policy.reference_logprobs(rollout)
    torch.testing.assert_close(before, run.policy.logprobs_and_values(rollout)[0], rtol=0, atol=1e-5)
    shake(run)
    assert torch.equal(run.policy.reference_logprobs(rollout), before)
    assert (run.policy.logprobs_and_values(rollout)[0] - before).abs().max() > 0.01
    names = run.policy.trainable_parameters()
    assert {name.split(".")[0] for name in names} == {"model", "value_head"}


class InterruptedRunError(Exception):
    """As if the process were killed."""


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = full_trainer(checkpoint_every=1)
    whole.train()

    def interrupt() -> None:
        if recorder.ended[-1] == 3:
            raise InterruptedRunError

    recorder = Recorder()
    recorder.then = interrupt
    with pytest.raises(InterruptedRunError):
        full_trainer(tmp_path, recorder, checkpoint_every=1).train()
    resumed = full_trainer(tmp_path, again := Recorder(), checkpoint_every=1)
    resumed.train()
    assert again.ended == [3, 4]
    assert resumed.history == whole.history
    assert_same_weights(resumed, weights(whole))


def test_over_the_kl_budget_all_parameters_return() -> None:
    """The first update breaks the budget, so all are as they were."""
    run = full_trainer(learning_rate=0.01, kl_budget=1e-3)
    run.train()
    assert run.updates_done == 1
    assert_same_weights(run, weights(full_trainer()))
