"""The PPO trainer on a two-layer model: what must hold at the first step, across micro-batches, and across a crash."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tasks.core.errors import TrainingError
from tasks.core.sections.generation import GenerationParams
from tasks.core.sections.ppo import PPOParams
from tasks.rewards.composition import CompositeReward
from tasks.rl.policy import Experience, Policy
from tasks.rl.trainer import PPOTrainer, TextCodec
from tests.conftest import EOS, PAD, tiny_policy

PARAMS = PPOParams(
    updates=4,
    prompts_per_update=6,
    samples_per_prompt=2,
    epochs=2,
    minibatches=1,
    micro_batch_size=12,
    learning_rate=1e-2,
    gamma=1.0,
    lam=0.95,
    clip_range=0.2,
    value_clip_range=0.2,
    value_coef=0.1,
    max_grad_norm=1.0,
    kl_coef=0.05,
    kl_controller="adaptive",
    kl_target=1.0,
    kl_horizon=100,
    max_approx_kl=10.0,
    missing_eos_penalty=0.5,
    checkpoint_every=2,
)
CODEC = TextCodec(
    prompts=[f"p{i}" for i in range(10)],
    prompt_ids=[list(range(3, 4 + i % 4)) for i in range(10)],
    decode=lambda ids: " ".join(map(str, ids)),
    eos_token_id=EOS,
    pad_token_id=PAD,
)


def low_tokens(prompts: list[str], responses: list[str]) -> list[float]:
    """Reward: the share of tokens below 16."""
    return [sum(int(word) < 16 for word in text.split()) / max(1, len(text.split())) for text in responses]


def trainer(reward=low_tokens, checkpoints=None, **changes) -> PPOTrainer:
    params = PARAMS.model_copy(update=changes)
    torch.manual_seed(0)
    policy = Policy(tiny_policy(), temperature=1.0)
    composed = CompositeReward({"rule": reward}, {"rule": 1.0})
    generation = GenerationParams(max_new_tokens=8, temperature=1.0)
    return PPOTrainer(policy, CODEC, composed, params, generation, seed=0, checkpoints=checkpoints)


def weights(ppo: PPOTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in ppo.policy.trainable().items()}


def experience_of(ppo: PPOTrainer) -> tuple[Experience, dict[str, float]]:
    return ppo._experience(*ppo._rollout())


def test_at_step_0_kl_is_0_and_the_reward_is_the_score():
    _, metrics = experience_of(trainer())
    assert metrics["kl"] == pytest.approx(0, abs=1e-4)
    assert metrics["kl_k3"] == pytest.approx(0, abs=1e-6)
    assert metrics["total_reward"] == pytest.approx(metrics["score"], abs=1e-4)
    assert metrics["score"] == pytest.approx(metrics["reward"] - 0.5 * metrics["no_end_share"], abs=1e-6)


def test_ratio_is_1_in_the_first_minibatch():
    ppo = trainer()
    experience, _ = experience_of(ppo)
    metrics = ppo._optimiser_step(experience)
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert metrics["clip_fraction"] == 0


def test_value_of_the_rollout_is_that_of_a_full_forward_pass():
    ppo = trainer()
    ppo.train()
    experience, _ = experience_of(ppo)
    with torch.no_grad():
        logprobs, values, _ = ppo.policy(experience)
    mask = experience.response_mask
    assert experience.old_values[mask].abs().max() > 1e-3, "the value head must have learned something to compare"
    torch.testing.assert_close(values[mask], experience.old_values[mask], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logprobs[mask], experience.old_logprobs[mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 5])
def test_micro_batches_do_not_change_the_gradient(size):
    gradients = []
    for micro_batch_size in (12, size):
        ppo = trainer(micro_batch_size=micro_batch_size)
        experience, _ = experience_of(ppo)
        ppo._optimiser_step(experience)
        gradients.append([p.grad.clone() for p in ppo.policy.trainable().values()])
    for whole, split in zip(*gradients, strict=True):
        torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-6)


def test_padding_changes_neither_loss_nor_gradient():
    """More pads on either side, with other ids in them, are the same batch."""
    ppo = trainer()
    plain, _ = experience_of(ppo)
    junk = torch.full((len(plain), 3), 17)
    off = torch.zeros_like(junk, dtype=torch.bool)
    zeros = torch.full(junk.shape, 99.0)
    padded = dataclasses.replace(
        plain,
        prompts=torch.cat([junk, plain.prompts], 1),
        prompt_mask=torch.cat([off, plain.prompt_mask], 1),
        responses=torch.cat([plain.responses, junk], 1),
        response_mask=torch.cat([plain.response_mask, off], 1),
        **{
            name: torch.cat([getattr(plain, name), zeros], 1)
            for name in ("old_logprobs", "old_values", "advantages", "returns")
        },
    )
    results = []
    for batch in (plain, padded):
        ppo.optimizer.zero_grad()
        actor, critic, _ = ppo._backward(batch, int(batch.response_mask.sum()))
        gradients = [p.grad.clone() for p in ppo.policy.trainable().values()]
        results.append((actor.loss.item(), critic.loss.item(), gradients))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4, abs=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4)
    for first, second in zip(results[0][2], results[1][2], strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-6)


def test_every_pass_over_the_prompts_uses_each_once():
    ppo = trainer(prompts_per_update=5)
    seen = []
    for update in range(4):
        ppo.update = update
        seen += ppo._prompt_indices()
    assert sorted(seen[:10]) == list(range(10))
    assert sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_a_run_that_goes_on_from_its_checkpoint_is_the_uninterrupted_run(tmp_path):
    whole = trainer()
    whole.train()
    broken = trainer(checkpoints=tmp_path)
    rounds, original = [], broken._round

    def interrupted():
        if len(rounds) == 3:
            raise KeyboardInterrupt
        rounds.append(1)
        return original()

    broken._round = interrupted
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = trainer(checkpoints=tmp_path)
    resumed.train()
    assert resumed.history == whole.history
    assert resumed.samples == whole.samples
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    assert list(tmp_path.iterdir()) == [], "a finished run leaves no checkpoint behind"


def test_a_loss_that_is_not_finite_stops_before_the_step(monkeypatch):
    ppo = trainer()
    experience, _ = experience_of(ppo)
    before = weights(ppo)
    broken = dataclasses.replace(experience, advantages=torch.full_like(experience.advantages, float("nan")))
    with pytest.raises(TrainingError, match=r"update 1: not finite: .*policy_loss"):
        ppo._optimiser_step(broken)
    for name, value in before.items():
        assert torch.equal(weights(ppo)[name], value), name


def test_a_policy_that_left_its_rollouts_behind_is_refused():
    ppo = trainer()
    experience, _ = experience_of(ppo)
    moved = dataclasses.replace(experience, old_logprobs=experience.old_logprobs - 5)
    with pytest.raises(TrainingError, match="mean probability ratio is 148"):
        ppo._optimiser_step(moved)


def test_no_step_is_taken_once_the_policy_has_moved_far_enough():
    """The first minibatch starts at the rollout policy (approximate KL 0); the second sees that it moved, and stops."""
    ppo = trainer(epochs=4, max_approx_kl=1e-9)
    ppo.train()
    assert {row["optimiser_steps"] for row in ppo.history} == {1}
