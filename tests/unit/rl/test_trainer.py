"""The RL trainer on a two-layer model: the first step, micro-batches, a crash, the KL budget; PPO and GRPO alike."""

import dataclasses

import pytest
import torch

from tasks.core import distributed
from tasks.core.errors import TrainingError
from tasks.rewards.composition import CompositeReward
from tasks.rl.trainer import _Stopwatch
from tests.support.tiny_trainer import (
    GRPO_PARAMS,
    PARAMS,
    PROMPTS,
    Recorder,
    assert_same_weights,
    experience_of,
    gradients,
    low_tokens,
    trainer,
    weights,
)

BOTH = pytest.mark.parametrize("params", [PARAMS, GRPO_PARAMS], ids=["ppo", "grpo"])


@BOTH
def test_at_step_0_kl_is_0_the_score_is_the_reward_less_the_penalty_and_the_ratio_is_1(params):
    run = trainer(params)
    experience, metrics = experience_of(run)
    assert metrics["kl"] == pytest.approx(0, abs=1e-4)
    assert metrics["kl_k3"] == pytest.approx(0, abs=1e-6)
    assert metrics.get("total_reward", metrics["score"]) == pytest.approx(metrics["score"], abs=1e-4)
    assert metrics["score"] == pytest.approx(metrics["reward"] - 0.5 * metrics["truncated_share"], abs=1e-6)
    step = run.updater.step(experience)
    assert step["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert step["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert step["clip_fraction"] == 0


def test_value_of_the_rollout_is_that_of_a_full_forward_pass():
    run = trainer()
    run.train()
    experience, _ = experience_of(run)
    with torch.no_grad():
        logprobs, values, _ = run.policy(experience)
    mask = experience.response_mask
    assert experience.old_values[mask].abs().max() > 1e-3, "the value head must have learned something to compare"
    torch.testing.assert_close(values[mask], experience.old_values[mask], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logprobs[mask], experience.old_logprobs[mask], rtol=1e-4, atol=1e-5)


CASES = {
    "ppo": PARAMS,
    "a response as one action": PARAMS.model_copy(update={"action": "response"}),
    **{kind: GRPO_PARAMS.model_copy(update={"loss_type": kind}) for kind in ("grpo", "bnpo", "dapo", "dr_grpo")},
}


@pytest.mark.parametrize("params", CASES.values(), ids=CASES)
def test_micro_batches_do_not_change_the_gradient(params):
    found = []
    for micro_batch_size in (12, 1, 5):
        run = trainer(params, micro_batch_size=micro_batch_size)
        experience, _ = experience_of(run)
        run.updater.step(experience)
        found.append(gradients(run))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


@BOTH
def test_padding_changes_neither_loss_nor_gradient(params):
    """More pads on either side, with other ids in them, are the same batch."""
    run = trainer(params)
    plain, _ = experience_of(run)
    junk = torch.full((len(plain), 3), 17)
    off = torch.zeros_like(junk, dtype=torch.bool)
    left = {"prompts": junk, "prompt_mask": off}
    right = {"responses": junk, "response_mask": off, "action_mask": off}
    per_token = ("old_logprobs", "old_values", "advantages", "returns", "reference_logprobs")
    right |= {name: torch.full(junk.shape, 99.0) for name in per_token if hasattr(plain, name)}
    padded = dataclasses.replace(
        plain,
        **{name: torch.cat([pads, getattr(plain, name)], 1) for name, pads in left.items()},
        **{name: torch.cat([getattr(plain, name), pads], 1) for name, pads in right.items()},
    )
    results = []
    for batch in (plain, padded):
        run.updater.optimizer.zero_grad()
        metrics = run.updater._backward(batch, batch).metrics()
        results.append((metrics, gradients(run)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-4, abs=1e-6)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("size", [5, 20])
def test_every_pass_over_the_prompts_uses_each_once(size):
    """Also where one update needs more prompts than there are."""
    run = trainer(prompts_per_update=size)
    seen = []
    for update in range(20 // size):
        run.updates_done = update
        seen += run._prompt_indices()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


@BOTH
def test_a_run_that_goes_on_from_its_checkpoint_is_the_uninterrupted_run(params, tmp_path):
    whole = trainer(params)
    whole.train()
    recorder = Recorder()
    broken = trainer(params, checkpoints=tmp_path, recorder=recorder)
    sample = broken.sample

    def interrupted():
        if broken.updates_done == 3:
            raise KeyboardInterrupt
        return sample()

    broken.sample = interrupted
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert recorder.ended == [1, 2, 3]
    recorder = Recorder()
    resumed = trainer(params, checkpoints=tmp_path, recorder=recorder)
    resumed.train()
    assert recorder.warnings[0] == "goes on from update 2 of 4 (checkpoint of an interrupted run)"
    assert recorder.logged == [1, 2, 3, 4], "its curves are whole"
    assert recorder.ended == [3, 4], "snapshots of updates before are there"
    assert resumed.history == whole.history
    assert resumed.samples == whole.samples
    assert resumed.rollouts == whole.rollouts
    assert len(whole.rollouts) == 4 * 12
    assert_same_weights(resumed, weights(whole))
    assert (tmp_path / "checkpoint-2").is_dir(), "it goes only when the outputs of the stage are written"


@BOTH
def test_a_loss_that_is_not_finite_stops_before_the_step(params):
    run = trainer(params)
    experience, _ = experience_of(run)
    before = weights(run)
    broken = dataclasses.replace(experience, advantages=torch.full_like(experience.advantages, float("nan")))
    with pytest.raises(TrainingError, match=r"^not finite: .*policy_loss.* from 12 of 12 responses"):
        run.updater.step(broken)
    assert_same_weights(run, before)


@BOTH
def test_a_policy_that_left_its_rollouts_behind_is_refused(params):
    run = trainer(params)
    experience, _ = experience_of(run)
    moved = dataclasses.replace(experience, old_logprobs=experience.old_logprobs - 5)
    with pytest.raises(TrainingError, match=rf"mean probability ratio is 148.*lower {params.stage}\.learning_rate"):
        run.updater.step(moved)


def test_no_step_is_taken_once_the_policy_has_moved_far_enough():
    """The first minibatch starts at the rollout policy (approximate KL 0); the second sees that it moved, and stops."""
    stopped, free = trainer(epochs=4, target_kl=1e-9), trainer(epochs=4, target_kl=None)
    for run in (stopped, free):
        run.train()
    assert {row["optimiser_steps"] for row in stopped.history} == {1}
    assert {row["optimiser_steps"] for row in free.history} == {4}


def test_ppo_anneals_the_learning_rate_by_update_and_grpo_by_optimiser_step():
    ppo, grpo = trainer(minibatches=2).algorithm, trainer(GRPO_PARAMS, minibatches=2).algorithm
    assert [ppo.learning_rate(update, step) for update, step in ((0, 3), (1, 0), (3, 3))] == [0.01, 0.0075, 0.0025]
    # 16 steps in all: the 4th of the first update is the 4th, the last of the last update the 16th.
    rates = [grpo.learning_rate(update, step) for update, step in ((0, 0), (0, 3), (3, 3))]
    assert rates == pytest.approx([0.01, 0.01 * 13 / 16, 0.01 / 16])


@BOTH
def test_the_learning_rate_rises_over_the_steps_of_the_warmup(params):
    run, taken = trainer(params, updates=4, epochs=1, minibatches=2, warmup_updates=2, target_kl=None), []
    original = run.updater.optimizer.step

    def step(*args):
        taken.append(run.updater.optimizer.param_groups[0]["lr"])
        return original(*args)

    run.updater.optimizer.step = step
    run.train()
    annealed = [0.01, 0.01, 0.0075, 0.0075, 0.005, 0.005, 0.0025, 0.0025]
    if params is GRPO_PARAMS:
        annealed = [0.01 * (8 - done) / 8 for done in range(8)]
    assert taken == pytest.approx([annealed[0] / 4, annealed[1] / 2, annealed[2] * 3 / 4, *annealed[3:]])
    assert run.history[1]["learning_rate"] == taken[2]


@BOTH
def test_a_failure_names_update_quantity_and_sample_and_keeps_the_last_checkpoint(params, tmp_path):
    whole = trainer(params)
    whole.train()
    broken = trainer(params, checkpoints=tmp_path, checkpoint_every=3)
    original = broken.algorithm.compute_advantages

    def experience(scored):
        found, metrics = original(scored)
        if broken.updates_done + 1 == 4:
            found.advantages[7, 0] = float("nan")
        return found, metrics

    broken.algorithm.compute_advantages = experience
    with pytest.raises(TrainingError) as caught:
        broken.train()
    message = str(caught.value)
    prompt = PROMPTS[broken._prompt_indices()[3]].prompt
    assert message.startswith("update 4: not finite: {'policy_loss': nan")
    assert f"from 1 of 12 responses: prompt '{prompt}', response " in message
    assert message.endswith("; the checkpoint of update 3 is kept")
    resumed = trainer(params, checkpoints=tmp_path)
    resumed.train()
    assert resumed.history == whole.history
    assert_same_weights(resumed, weights(whole))


def test_a_reward_that_is_not_finite_names_update_component_and_sample():
    run = trainer(reward=lambda prompts, responses: [float("nan")] * len(prompts))
    with pytest.raises(
        TrainingError, match=r"^update 1: reward component 'rule' is nan .* prompt '[\d ]+', response '"
    ):
        run.train()


def test_a_log_probability_that_is_not_finite_names_whose_it_is(monkeypatch):
    run = trainer()
    reference = run.policy.reference_logprobs

    def broken(rollout):
        logprobs = reference(rollout).clone()
        logprobs[5, 0] = float("inf")
        return logprobs

    monkeypatch.setattr(run.policy, "reference_logprobs", broken)
    with pytest.raises(TrainingError, match=r"^update 1: log-probability of the reference not finite for 1 of 12 "):
        run.train()


BUDGET = {"updates": 6, "kl_coef": 0.0, "kl_controller": "fixed", "kl_budget": 0.3}


def over_budget(params=PARAMS, **changes):
    """A run whose KL grows past its budget, the weights after each of its updates, and its warnings."""
    recorder, snapshots = Recorder(), []
    run = trainer(params, recorder=recorder, **(BUDGET | changes))
    recorder.then = lambda: snapshots.append(weights(run))
    run.train()
    return run, snapshots, [message for message in recorder.warnings if "nats per response" in message]


@BOTH
def test_kl_budget_ends_training_with_the_last_policy_that_kept_it(params):
    free, snapshots, messages = over_budget(params, kl_budget=None)
    assert messages == []
    kls = [row["kl"] for row in free.history]
    first_over = next(update for update in range(2, 5) if kls[update] > max(kls[:update]))
    run, _, messages = over_budget(params, kl_budget=(kls[first_over] + max(kls[:first_over])) / 2)
    assert run.history == free.history[:first_over]
    assert_same_weights(run, snapshots[first_over - 2])
    (message,) = messages
    assert f"the KL after update {first_over} is {kls[first_over]:.3g} nats per response" in message
    assert message.endswith(f"whose KL was {kls[first_over - 1]:.3g}")


def test_kl_budget_holds_for_the_last_update_as_well():
    """A run of two updates whose second passes the budget: no further round measures it, but the budget does."""
    _, snapshots, _ = over_budget(updates=2, kl_budget=None)
    run, _, messages = over_budget(updates=2, kl_budget=1.0001 * over_budget(updates=2)[0].history[-1]["kl"])
    assert len(run.history) == 2
    (message,) = messages
    assert message.startswith("the KL after update 2 is ")
    assert_same_weights(run, snapshots[0])


def test_a_budget_below_the_first_kl_is_refused():
    run = trainer(**BUDGET)
    run.kl_budget.limit = -1.0
    with pytest.raises(
        TrainingError, match=r"^update 1: the KL is .* before any update, over ppo\.kl_budget -1; raise"
    ):
        run.train()


def test_kl_budget_survives_an_interruption(tmp_path):
    whole, _, _ = over_budget()
    settings = BUDGET | {"checkpoint_every": 1}
    broken = trainer(checkpoints=tmp_path, **settings)
    broken.kl_budget.exceeded = lambda kl: kl > 0.3 and 1 / 0
    with pytest.raises(ZeroDivisionError):
        broken.train()
    resumed = trainer(checkpoints=tmp_path, **settings)
    resumed.train()
    assert resumed.history == whole.history
    assert_same_weights(resumed, weights(whole))


@pytest.mark.parametrize("advantage", ["gae", "leave_one_out"])
def test_a_response_as_one_action_has_one_ratio_that_starts_at_1(advantage):
    """Its log-probability is the sum over its tokens, its return score − β·KL; advantages are whitened over them."""
    run = trainer(action="response", advantage=advantage, value_coef=0.0, missing_eos_penalty=0.0)
    scored = run.score(run.sample())
    rollout, (experience, _) = scored.rollout, run.algorithm.compute_advantages(scored)
    assert experience.advantages.shape == experience.action_mask.shape == (12, 1)
    assert experience.old_logprobs is rollout.logprobs
    scores = torch.tensor(low_tokens(rollout.prompt_texts, rollout.texts))
    torch.testing.assert_close(experience.returns[:, 0], scores, atol=1e-4, rtol=0)  # the KL is 0 at the start
    gains = scores if advantage == "gae" else scores - scores.reshape(6, 2).flip(1).reshape(-1)
    whitened = (gains - gains.mean()) / gains.std(correction=0)
    torch.testing.assert_close(experience.advantages[:, 0], whitened, atol=1e-3, rtol=0)
    step = run.updater.step(experience)
    assert step["ratio_max"] == pytest.approx(1, abs=1e-5)
    if advantage == "gae":
        errors = experience.old_values - experience.returns
        assert step["value_loss"] == pytest.approx((errors**2).mean().item() / 2, rel=1e-4), "a mean over responses"


def test_grpo_learns_from_scores_standardised_within_a_prompts_responses():
    run = trainer(GRPO_PARAMS, samples_per_prompt=3)
    assert run.sample().values is None
    assert all("lora" in name for name in weights(run)), "there is no value head"
    scored = run.score(run.sample())
    experience, _ = run.algorithm.compute_advantages(scored)
    for prompt in range(6):
        own = scored.scores[3 * prompt : 3 * prompt + 3].tolist()
        mean = sum(own) / 3
        deviation = (sum((score - mean) ** 2 for score in own) / 2) ** 0.5
        for row, score in enumerate(own, start=3 * prompt):
            tokens = experience.advantages[row][experience.response_mask[row]].tolist()
            assert tokens == pytest.approx([(score - mean) / (deviation + 1e-4)] * len(tokens), abs=1e-4)


def test_a_run_that_degenerates_warns_once_and_counts(monkeypatch):
    recorder = Recorder()
    run = trainer(recorder=recorder, updates=3, reward=lambda prompts, texts: [0.5] * len(texts))
    monkeypatch.setattr(run.sampler.tokenizer, "decode", lambda ids, skip_special_tokens: " ")
    run.train()
    found = [message for message in recorder.warnings if "empty" in message]
    assert found == ["warning: update 1: all responses are empty"]
    assert min(row["degenerate_count"] for row in run.history) == 1
    assert [row["empty_share"] for row in run.history] == [1, 1, 1]


class OODScorer:
    """A component that finds every second response out of distribution, and from the second update on all of them."""

    def __init__(self):
        self.share = iter([0.5, 1.0, 1.0])
        self.scored = []

    def __call__(self, prompts, responses):
        raise AssertionError("a second pass")

    def score_with_metrics(self, prompts, responses):
        self.scored.append(responses)
        share = next(self.share)
        is_ood = torch.tensor([float(row < share * len(responses)) for row in range(len(responses))])
        return torch.linspace(0, 1, len(responses)), {"ood_share": is_ood}


@BOTH
def test_metrics_of_the_reward_are_logged_and_watched(params, monkeypatch):
    recorder, scorer, decoded = Recorder(), OODScorer(), []
    run = trainer(params, recorder=recorder, updates=3)
    run.reward = CompositeReward({"learned": scorer}, {"learned": 1.0})
    tokenizer, decode = run.sampler.tokenizer, run.sampler.tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: decoded.append(ids) or decode(ids, **options))
    run.train()
    assert [row["ood_share"] for row in run.history] == [0.5, 1.0, 1.0]
    assert [row["hacking/ood_responses"] for row in run.history] == [0.0, 0.5, 0.5]
    (finding,) = [message for message in recorder.warnings if "ood_responses" in message]
    assert finding.startswith("warning: update 2: ood_responses 0.50 (threshold 0.25")
    assert len(decoded) == 3 * 12 * 2, "each response is turned into text once, behind its prompt's last token"
    assert [sample["response"] for sample in run.samples[:2]] == [scorer.scored[0][0], scorer.scored[0][3]]


@BOTH
def test_every_update_is_reported_and_has_its_detectors(params):
    recorder = Recorder()
    scores = iter([1.0, 0.4, 0.4])

    def varied(prompts: list[str], texts: list[str]) -> list[float]:
        spread = next(scores)
        return [spread * (row % 2) for row in range(len(texts))]

    run = trainer(params, recorder=recorder, updates=3, missing_eos_penalty=0.0, reward=varied)
    run.train()
    assert recorder.ended == recorder.logged == [1, 2, 3]
    assert [row["hacking/reward_variance_collapse"] for row in run.history] == pytest.approx([1, 1, 2.5])
    first, *later = (row["length"] for row in run.history)
    drifts = [max(first / now, now / first) for now in later]
    assert run.history[2]["hacking/length_drift"] == pytest.approx(min(drifts))
    assert [message for message in recorder.warnings if "reward_variance_collapse" in message] == [
        "warning: update 3: reward_variance_collapse 2.50 (threshold 2, healthy up to 1.65): all responses earn nearly "
        "the same, so there is little left to learn from but noise"
    ]


def test_the_speed_of_a_rollout_counts_the_tokens_of_all_ranks(monkeypatch):
    rollout, clock = trainer().sample(), _Stopwatch()
    clock.lap("rollout_s")
    own = clock.metrics(rollout)["time/rollout_tokens_per_s"]
    assert own == rollout.response_mask.sum().item() / clock.metrics(rollout)["time/rollout_s"]
    monkeypatch.setattr(distributed, "all_gather", lambda tensor: torch.cat([tensor, tensor]))
    assert clock.metrics(rollout)["time/rollout_tokens_per_s"] == 2 * own
