"""The PPO trainer on a two-layer model: what must hold at the first step, across micro-batches, and across a crash."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tasks.config.training import GenerationParams, PPOParams
from tasks.core.errors import TrainingError
from tasks.rewards.composition import CompositeReward
from tasks.rl.policy import Experience, Policy
from tasks.rl.trainer import PPOTrainer, PromptSet
from tests.conftest import EOS, PAD, tiny_policy

PARAMS = PPOParams(
    updates=4,
    prompts_per_update=6,
    samples_per_prompt=2,
    epochs=2,
    minibatches=1,
    micro_batch_size=12,
    learning_rate=1e-2,
    action="token",
    advantage="gae",
    gamma=1.0,
    lam=0.95,
    clip_range=0.2,
    value_clip_range=0.2,
    value_coef=0.1,
    max_grad_norm=1.0,
    kl_coef=0.05,
    kl_controller="adaptive",
    adaptive_kl_target=1.0,
    kl_horizon=100,
    target_kl=10.0,
    missing_eos_penalty=0.5,
    checkpoint_every=2,
    snapshot_every=2,
)
CODEC = PromptSet(
    prompts=[f"p{i}" for i in range(10)],
    prompt_ids=[list(range(3, 4 + i % 4)) for i in range(10)],
    decode=lambda ids: " ".join(map(str, ids)),
    eos_token_id=EOS,
    pad_token_id=PAD,
)


def low_tokens(prompts: list[str], responses: list[str]) -> list[float]:
    """Reward: the share of tokens below 16."""
    return [sum(int(word) < 16 for word in text.split()) / max(1, len(text.split())) for text in responses]


def trainer(reward=low_tokens, checkpoints=None, log=None, warn=print, **changes) -> PPOTrainer:
    params = PARAMS.model_copy(update=changes)
    torch.manual_seed(0)
    policy = Policy(tiny_policy(), temperature=1.0)
    composed = CompositeReward({"rule": reward}, {"rule": 1.0})
    generation = GenerationParams(max_new_tokens=8, temperature=1.0)
    log = log or (lambda metrics, step: None)
    return PPOTrainer(policy, CODEC, composed, params, generation, seed=0, checkpoints=checkpoints, log=log, warn=warn)


def weights(ppo: PPOTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in ppo.policy.trainable_parameters().items()}


def experience_of(ppo: PPOTrainer) -> tuple[Experience, dict[str, float]]:
    return ppo._build_experience(*ppo._score_rollout(*ppo._rollout()))


def test_at_step_0_kl_is_0_and_the_reward_is_the_score():
    _, metrics = experience_of(trainer())
    assert metrics["kl"] == pytest.approx(0, abs=1e-4)
    assert metrics["kl_k3"] == pytest.approx(0, abs=1e-6)
    assert metrics["total_reward"] == pytest.approx(metrics["score"], abs=1e-4)
    assert metrics["score"] == pytest.approx(metrics["reward"] - 0.5 * metrics["truncated_share"], abs=1e-6)


def test_ratio_is_1_in_the_first_minibatch():
    ppo = trainer()
    experience, _ = experience_of(ppo)
    metrics = ppo.updater.step(experience)
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
        ppo.updater.step(experience)
        gradients.append([p.grad.clone() for p in ppo.policy.trainable_parameters().values()])
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
        action_mask=torch.cat([plain.action_mask, off], 1),
        **{
            name: torch.cat([getattr(plain, name), zeros], 1)
            for name in ("old_logprobs", "old_values", "advantages", "returns")
        },
    )
    results = []
    for batch in (plain, padded):
        ppo.updater.optimizer.zero_grad()
        actor, critic, _ = ppo.updater._backward(batch, int(batch.response_mask.sum()))
        gradients = [p.grad.clone() for p in ppo.policy.trainable_parameters().values()]
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
    rounds, original = [], broken._update_step

    def interrupted():
        if len(rounds) == 3:
            raise KeyboardInterrupt
        rounds.append(1)
        return original()

    broken._update_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    logged = []
    resumed = trainer(checkpoints=tmp_path, log=lambda metrics, step: logged.append(step) if "kl" in metrics else None)
    resumed.train()
    assert logged == [1, 2, 3, 4], "its curves are whole"
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
    with pytest.raises(TrainingError, match=r"^not finite: .*policy_loss.* from 12 of 12 responses"):
        ppo.updater.step(broken)
    for name, value in before.items():
        assert torch.equal(weights(ppo)[name], value), name


def test_a_policy_that_left_its_rollouts_behind_is_refused():
    ppo = trainer()
    experience, _ = experience_of(ppo)
    moved = dataclasses.replace(experience, old_logprobs=experience.old_logprobs - 5)
    with pytest.raises(TrainingError, match="mean probability ratio is 148"):
        ppo.updater.step(moved)


def test_no_step_is_taken_once_the_policy_has_moved_far_enough():
    """The first minibatch starts at the rollout policy (approximate KL 0); the second sees that it moved, and stops."""
    ppo = trainer(epochs=4, target_kl=1e-9)
    ppo.train()
    assert {row["optimiser_steps"] for row in ppo.history} == {1}


def broken_at(update: int, row: int, ppo: PPOTrainer) -> PPOTrainer:
    """The trainer, whose advantage of one response is NaN in one update."""
    original = ppo._compute_advantages

    def actions(rollout, rewards):
        experience = original(rollout, rewards)
        if ppo.update + 1 == update:
            experience.advantages[row, 0] = float("nan")
        return experience

    ppo._compute_advantages = actions
    return ppo


def test_a_failure_names_update_quantity_and_sample_and_keeps_the_last_checkpoint(tmp_path):
    whole = trainer()
    whole.train()
    broken = broken_at(4, row=7, ppo=trainer(checkpoints=tmp_path, checkpoint_every=3))
    with pytest.raises(TrainingError) as caught:
        broken.train()
    message = str(caught.value)
    asked = CODEC.decode(CODEC.prompt_ids[broken._prompt_indices()[3]])
    assert message.startswith("update 4: not finite: {'policy_loss': nan")
    assert f"from 1 of 12 responses: prompt '{asked}', response " in message
    assert message.endswith("; the checkpoint of update 3 is kept")
    resumed = trainer(checkpoints=tmp_path)
    resumed.train()
    assert resumed.history == whole.history
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name


def test_a_reward_that_is_not_finite_names_update_component_and_sample():
    with pytest.raises(TrainingError, match=r"^update 1: reward component 'rule' is nan .* prompt 'p\d', response '"):
        trainer(reward=lambda prompts, responses: [float("nan")] * len(prompts)).train()


def test_a_log_probability_that_is_not_finite_names_whose_it_is(monkeypatch):
    ppo = trainer()
    reference = ppo.policy.reference_logprobs

    def broken(rollout):
        logprobs = reference(rollout).clone()
        logprobs[5, 0] = float("inf")
        return logprobs

    monkeypatch.setattr(ppo.policy, "reference_logprobs", broken)
    with pytest.raises(TrainingError, match=r"^update 1: log-probability of the reference not finite for 1 of 12 "):
        ppo.train()


def over_budget(**changes) -> tuple[PPOTrainer, list[dict[str, torch.Tensor]], list[str]]:
    """A run whose KL grows past its budget, the weights after each of its updates, and its warnings."""
    snapshots, messages = [], []

    def log(metrics, step):
        if "kl" in metrics:
            snapshots.append(weights(ppo))

    settings = {"updates": 6, "kl_coef": 0.0, "kl_controller": "fixed", "kl_budget": 0.3} | changes
    ppo = trainer(log=log, warn=messages.append, **settings)
    ppo.train()
    return ppo, snapshots, messages


def test_kl_budget_ends_training_with_the_last_policy_that_kept_it():
    free, snapshots, messages = over_budget(kl_budget=None)
    assert messages == []
    kls = [row["kl"] for row in free.history]
    first_over = next(update for update, kl in enumerate(kls) if kl > 0.3)
    assert 2 <= first_over < 5, "the run must pass the budget in its middle"
    ppo, _, messages = over_budget()
    assert ppo.history == free.history[:first_over]
    for name, value in snapshots[first_over - 2].items():
        assert torch.equal(weights(ppo)[name], value), name
    assert len(messages) == 1
    assert f"the KL after update {first_over} is {kls[first_over]:.3g} nats per response" in messages[0]
    assert messages[0].endswith(f"whose KL was {kls[first_over - 1]:.3g}")


def test_kl_budget_holds_for_the_last_update_as_well():
    """A run of two updates whose second passes the budget: no further round measures it, but the budget does."""
    _, snapshots, _ = over_budget(updates=2, kl_budget=None)
    ppo, _, messages = over_budget(updates=2, kl_budget=1.0001 * over_budget(updates=2)[0].history[-1]["kl"])
    assert len(ppo.history) == 2
    assert len(messages) == 1
    assert messages[0].startswith("the KL after update 2 is ")
    for name, value in snapshots[0].items():
        assert torch.equal(weights(ppo)[name], value), name


def test_kl_budget_survives_an_interruption(tmp_path):
    whole, _, _ = over_budget()
    stopped_in = len(whole.history)
    settings = {"updates": 6, "kl_coef": 0.0, "kl_controller": "fixed", "kl_budget": 0.3, "checkpoint_every": 1}
    broken = broken_at(stopped_in + 1, 0, trainer(checkpoints=tmp_path, **settings))
    broken._revert_if_over_budget = lambda kl: 1 / 0 if kl > 0.3 else False
    with pytest.raises(ZeroDivisionError):
        broken.train()
    resumed = trainer(checkpoints=tmp_path, **settings)
    resumed.train()
    assert resumed.history == whole.history
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name


@pytest.mark.parametrize("advantage", ["gae", "leave_one_out"])
def test_a_response_as_one_action_has_one_ratio_that_starts_at_1(advantage):
    """Its log-probability is the sum over its tokens, its return score − β·KL; advantages are whitened over them."""
    ppo = trainer(action="response", advantage=advantage, value_coef=0.0, missing_eos_penalty=0.0)
    rollout, prompts = ppo._rollout()
    experience, metrics = ppo._build_experience(*ppo._score_rollout(rollout, prompts))
    assert experience.advantages.shape == experience.old_logprobs.shape == experience.action_mask.shape == (12, 1)
    torch.testing.assert_close(experience.old_logprobs[:, 0], rollout.logprobs.sum(1))
    scores = torch.tensor(low_tokens(prompts, [CODEC.decode(ids) for ids in rollout.response_ids()]))
    torch.testing.assert_close(experience.returns[:, 0], scores, atol=1e-4, rtol=0)  # the KL is 0 at the start
    gains = scores if advantage == "gae" else scores - scores.reshape(6, 2).flip(1).reshape(-1)
    whitened = (gains - gains.mean()) / gains.std(correction=0)
    torch.testing.assert_close(experience.advantages[:, 0], whitened, atol=1e-3, rtol=0)
    step = ppo.updater.step(experience)
    assert step["ratio_max"] == pytest.approx(1, abs=1e-5)
    errors = experience.old_values - experience.returns
    assert step["value_loss"] == pytest.approx((errors**2).mean().item() / 2, rel=1e-4), "a mean over responses"
    assert metrics["kl"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("size", [1, 5])
def test_micro_batches_do_not_change_the_gradient_of_responses(size):
    gradients = []
    for micro_batch_size in (12, size):
        ppo = trainer(action="response", micro_batch_size=micro_batch_size)
        experience, _ = experience_of(ppo)
        ppo.updater.step(experience)
        gradients.append({name: weight.grad.clone() for name, weight in ppo.policy.trainable_parameters().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_a_run_that_degenerates_warns_once_and_counts():
    messages = []
    ppo = trainer(warn=messages.append, updates=3)
    ppo.prompt_set = dataclasses.replace(CODEC, decode=lambda ids: " ")
    ppo.reward = CompositeReward({"rule": lambda prompts, texts: [0.5] * len(texts)}, {"rule": 1.0})
    ppo.train()
    assert [message for message in messages if "empty" in message] == ["warning: update 1: all responses are empty"]
    assert min(row["degenerate_count"] for row in ppo.history) == 1
    assert [row["empty_share"] for row in ppo.history] == [1, 1, 1]


class Noticing:
    """A component that finds every second response unfamiliar, and from the second update on all of them."""

    def __init__(self):
        self.share = iter([0.5, 1.0, 1.0])
        self.asked = []

    def __call__(self, prompts, responses):
        raise AssertionError("a second pass")

    def measured(self, prompts, responses):
        self.asked.append(responses)
        share = next(self.share)
        unfamiliar = torch.tensor([float(place < share * len(responses)) for place in range(len(responses))])
        return torch.linspace(0, 1, len(responses)), {"ood_share": unfamiliar}


def test_what_the_reward_notices_is_logged_and_watched():
    messages, noticing, decoded = [], Noticing(), []
    ppo = trainer(warn=messages.append, updates=3)
    ppo.reward = CompositeReward({"learned": noticing}, {"learned": 1.0})
    ppo.prompt_set = dataclasses.replace(CODEC, decode=lambda ids: decoded.append(ids) or CODEC.decode(ids))
    ppo.train()
    assert [row["ood_share"] for row in ppo.history] == [0.5, 1.0, 1.0]
    assert [row["hacking/ood_responses"] for row in ppo.history] == [0.0, 0.5, 0.5]
    (finding,) = [message for message in messages if "ood_share" in message]
    assert finding.startswith("warning: update 2: ood_responses 0.50 (threshold 0.25")
    assert len(decoded) == 3 * 12, "each response is turned into text once"
    assert [sample["response"] for sample in ppo.samples[:2]] == [noticing.asked[0][0], noticing.asked[0][3]]


def test_every_update_is_kept_and_has_its_signs_of_hacking():
    messages, kept = [], []
    ppo = trainer(warn=messages.append, updates=3, missing_eos_penalty=0.0)
    scores = iter([1.0, 0.4, 0.4])

    def varied(prompts: list[str], texts: list[str]) -> list[float]:
        spread = next(scores)
        return [spread * (place % 2) for place in range(len(texts))]

    ppo.reward, ppo._save_snapshot = CompositeReward({"rule": varied}, {"rule": 1.0}), kept.append
    ppo.train()
    assert kept == [1, 2, 3]
    assert [row["hacking/reward_variance_collapse"] for row in ppo.history] == pytest.approx([1, 1, 2.5])
    first, *later = (row["length"] for row in ppo.history)
    drifts = [max(first / now, now / first) for now in later]
    assert ppo.history[2]["hacking/length_drift"] == pytest.approx(min(drifts))
    assert [message for message in messages if "reward_variance_collapse" in message] == [
        "warning: update 3: reward_variance_collapse 2.50 (threshold 2, healthy up to 1.65): all responses earn nearly "
        "the same, so there is little left to learn from but noise"
    ]
