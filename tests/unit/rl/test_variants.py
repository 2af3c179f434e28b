"""Variants of PPO and GRPO: values and gradients by hand, and what each setting changes in a run of the trainer."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tasks.config.rl import GRPOParams, PPOParams
from tasks.rl.advantages import (
    apply_missing_eos_penalty,
    gae,
    group_advantages,
    groups_without_signal,
    overlong_ramp,
    top_entropy_tokens,
)
from tasks.rl.algorithm import replace_groups
from tasks.rl.losses import cispo_loss, entropy_from_logits, policy_loss, response_means
from tests.support.tiny_trainer import (
    GRPO_PARAMS,
    PARAMS,
    Recorder,
    assert_same_weights,
    experience_of,
    gradients,
    low_tokens,
    trainer,
    weights,
)

NAN = math.nan
LOO = {"advantage": "leave_one_out", "value_coef": 0.0}
RETURN = {"advantage": "return", "value_coef": 0.0}


def f64(values: Any, *, requires_grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=requires_grad)


def all_true(values: Tensor) -> Tensor:
    return torch.ones_like(values, dtype=torch.bool)


# -- losses ------------------------------------------------------------------------------------------------------------


def loss_at(ratios: list[float], gains: list[float], **options: Any) -> tuple[float, list[float], float]:
    """Loss, gradient with respect to the log-probabilities, and how many tokens were clipped."""
    logprobs = f64([ratios]).log().requires_grad_()
    mask = all_true(logprobs)
    result = policy_loss(logprobs, torch.zeros_like(logprobs), f64([gains]), mask, clip_range=0.2, **options)
    result.loss.backward()
    assert logprobs.grad is not None
    return result.loss.item(), logprobs.grad[0].tolist(), result.clipped.item()


def test_clip_higher_by_hand() -> None:
    # ε = 0.2 below and 0.5 above. ρ = 1.4, A = 1: −1.4, within.  ρ = 1.6, A = 1: −1.5, clipped.
    #                              ρ = 0.7, A = −1: max(0.7, 0.8) = 0.8, clipped.
    loss, gradient, clipped = loss_at([1.4, 1.6, 0.7], [1.0, 1.0, -1.0], clip_range_high=0.5)
    assert loss == pytest.approx(-1.4 - 1.5 + 0.8, rel=1e-12)
    assert gradient == pytest.approx([-1.4, 0, 0], abs=1e-12)
    assert clipped == 2


def test_dual_clip_by_hand() -> None:
    # c = 3. ρ = 4, A = −2: max(8, 2.4) = 8, then min(8, 6) = 6, without gradient.   ρ = 2, A = −2: 4 stays.
    #        ρ = 0.5, A = −2: max(1, 1.6) = 1.6, clipped from below as ever.         ρ = 4, A = 1: −1.2 stays.
    loss, gradient, clipped = loss_at([4.0, 2.0, 0.5, 4.0], [-2.0, -2.0, -2.0, 1.0], dual_clip=3.0)
    assert loss == pytest.approx(6 + 4 + 1.6 - 1.2, rel=1e-12)
    assert gradient == pytest.approx([0, 4, 0, 0], abs=1e-12)
    assert clipped == 3


def test_cispo_by_hand() -> None:
    # max ratio 2. ρ = 3, A = 1: −2 · log π, gradient −2.  ρ = 0.5, A = −2: 1 · log π, gradient 1.  The third is masked.
    logprobs = f64([[-0.5, -1.5, NAN]], requires_grad=True)
    old = f64([[-0.5 - math.log(3), -1.5 + math.log(2), NAN]])
    mask = torch.tensor([[True, True, False]])
    weight = f64([[0.5, 0.5, NAN]])
    result = cispo_loss(logprobs, old, f64([[1.0, -2.0, NAN]]), mask, max_ratio=2.0, weights=weight)
    assert result.loss.item() == pytest.approx(0.5 * (-2 * -0.5 + 1 * -1.5), rel=1e-12)
    result.loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad[0].tolist() == pytest.approx([-1.0, 0.5, 0.0], abs=1e-12)
    assert result.clipped.item() == 1


def test_the_ratio_of_a_sequence_by_hand() -> None:
    # The geometric mean of 2 and 8 is 4: s = 4 at both tokens, and ∂s/∂logp = s/2 at each.
    logprobs = f64([[math.log(2), math.log(8), NAN]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    ratios = response_means(logprobs, mask).exp()
    assert ratios[0, :2].tolist() == pytest.approx([4, 4], rel=1e-12)
    ratios[0, 0].backward()
    assert logprobs.grad is not None
    assert logprobs.grad[0].tolist() == pytest.approx([2, 2, 0], abs=1e-12)


def test_the_gradient_of_the_entropy_by_its_formula() -> None:
    """∂H/∂logit_v = −p_v · (log p_v + H), over the temperature."""
    logits = f64([[[0.3, -0.7, 0.4]]], requires_grad=True)
    entropy = entropy_from_logits(logits, 2.0)
    entropy.sum().backward()
    p = torch.softmax(logits.detach() / 2, -1)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, -p * (p.log() + entropy.detach()[..., None]) / 2, rtol=1e-12, atol=0)


# -- scores and advantages ---------------------------------------------------------------------------------------------


def test_scales_of_group_advantages_by_hand() -> None:
    # Groups 1, 3 and 0, 8: centred −1, 1 and −4, 4. All four: mean 3, squares 4 + 0 + 9 + 25 over 3.
    scores = torch.tensor([1.0, 3.0, 0.0, 8.0])
    assert group_advantages(scores, 2, "none").tolist() == [-1, 1, -4, 4]
    scale = (38 / 3) ** 0.5 + 1e-4
    expected = [value / scale for value in (-1, 1, -4, 4)]
    assert group_advantages(scores, 2, "batch").tolist() == pytest.approx(expected, rel=1e-6)


def test_groups_without_signal() -> None:
    assert groups_without_signal(torch.tensor([1.0, 1.0, 0.0, 1.0, 2.0, 2.0]), 2) == [0, 2]


def test_the_overlong_ramp_by_hand() -> None:
    # L_max 10, buffer 4: 0 up to 6 tokens, then (|y| − 6) / 4. DAPO's equation 13 at |y| = 8: (6 − 8) / 4 = −0.5.
    lengths = torch.tensor([3, 6, 8, 10])
    ramp = overlong_ramp(lengths, longest=10, buffer=4)
    assert ramp.tolist() == [0, 0, 0.5, 1]
    has_eos = torch.tensor([True, True, True, False])
    assert apply_missing_eos_penalty(torch.ones(4), has_eos, 2.0, ramp).tolist() == [1, 1, 0, -1]
    assert overlong_ramp(lengths, longest=10, buffer=0).tolist() == [0, 0, 0, 0]


def test_top_entropy_tokens_by_hand() -> None:
    # Of 0, 1, 2, 3, 4 the 0.6 quantile is 2.4: two of five tokens are above. The masked one has no say.
    entropies = torch.tensor([[0.0, 4.0, 1.0], [2.0, 3.0, 99.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    kept = top_entropy_tokens(entropies, mask, 0.4)
    assert kept.tolist() == [[False, True, False], [False, True, False]]
    many = torch.arange(2.0**24 + 1)[None]
    assert top_entropy_tokens(many, torch.ones_like(many, dtype=torch.bool), 0.5).sum() == 2**23 + 1


def test_decoupled_lambda() -> None:
    """The returns are those of λ = 1, the plain sums of rewards; the advantages stay those of their own λ."""
    plain, split = (trainer(PARAMS, lam=0.5, value_lam=value_lam) for value_lam in (None, 1.0))
    for run in (plain, split):
        run.train()
    (one, _), (other, _) = experience_of(plain), experience_of(split)
    scored = split.score(split.sample())
    mask, values = scored.rollout.response_mask, scored.rollout.values
    rewards = -split.algorithm.kl_controller.kl_coef * scored.kl.k1
    last = mask.sum(1) - 1
    rewards[torch.arange(len(last)), last] += scored.scores
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(other.returns[mask], to_go[mask], rtol=1e-4, atol=1e-4)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.5)
    centred = advantages[mask] - advantages[mask].mean()
    torch.testing.assert_close(other.advantages[mask], centred / centred.std(correction=0), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(other.returns[mask], returns[mask], atol=1e-2)
    assert one.returns.shape == mask.shape


def test_reinforce_plus_plus_advantages_are_the_whitened_returns() -> None:
    """A_t = score − β · Σ_{s ≥ t} k1_s, centred and scaled over all tokens (arXiv 2501.03262)."""
    run = trainer(PARAMS, **RETURN)
    run.train()
    experience, _ = experience_of(run)
    scored = run.score(run.sample())
    mask = scored.rollout.response_mask
    to_go = (scored.kl.k1 * mask).flip(1).cumsum(1).flip(1)
    gains = (scored.scores.unsqueeze(1) - run.algorithm.kl_controller.kl_coef * to_go)[mask]
    expected = (gains - gains.mean()) / gains.std(correction=0)
    torch.testing.assert_close(experience.advantages[mask], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [LOO, RETURN], ids=["leave_one_out", "return"])
def test_without_a_value_function_no_value_is_computed(changes: dict[str, Any]) -> None:
    run = trainer(PARAMS, **changes)
    run.train()
    assert run.policy.value_head is None
    assert run.sample().values is None
    assert not {"value_loss", "value_clip_fraction", "explained_variance"} & set(run.history[0])


# -- in the trainer ----------------------------------------------------------------------------------------------------

VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "cispo": (GRPO_PARAMS, {"loss_type": "cispo", "clip_range": None, "clip_range_high": 1.0}),
    "gspo": (GRPO_PARAMS, {"importance_level": "sequence", "clip_range": 1e-3}),
    "grpo, masked": (GRPO_PARAMS, {"mask_truncated": True}),
    "grpo, entropy": (GRPO_PARAMS, {"entropy_coef": 0.1}),
    "grpo, top entropy": (GRPO_PARAMS, {"top_entropy_share": 0.3}),
    "grpo, KL in the reward": (GRPO_PARAMS, {"kl_penalty": "reward"}),
    "ppo, masked": (PARAMS, {"mask_truncated": True}),
    "ppo, entropy": (PARAMS, {"entropy_coef": 0.1}),
    "ppo, top entropy": (PARAMS, {"top_entropy_share": 0.3}),
    "ppo, KL in the loss": (PARAMS, {"kl_penalty": "loss"}),
    "ppo on responses, KL in the loss": (PARAMS, {"kl_penalty": "loss", "action": "response"}),
    "leave-one-out": (PARAMS, LOO),
    "return": (PARAMS, RETURN),
}


@pytest.mark.parametrize(("params", "changes"), VARIANTS.values(), ids=VARIANTS)
def test_each_variant_has_a_gradient_of_its_own_however_the_step_is_split(params: Any, changes: dict[str, Any]) -> None:
    found = []
    for settings in (changes, changes | {"micro_batch_size": 5}, {}):
        run = trainer(params, **settings)
        run.algorithm.kl_controller.kl_coef = 1.0
        for name, weight in sorted(run.policy.trainable_parameters().items()):  # off the reference
            weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
        experience, _ = experience_of(run)
        moved = experience.old_logprobs + torch.linspace(-0.3, 0.3, len(experience)).unsqueeze(1)
        run.updater.step(dataclasses.replace(experience, old_logprobs=moved))
        found.append(gradients(run))
    whole, split, plain = found
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-3, atol=1e-6)
    assert any(not torch.allclose(plain[name], gradient, rtol=1e-2, atol=1e-5) for name, gradient in whole.items())


@pytest.mark.parametrize("params", [PARAMS, GRPO_PARAMS], ids=["ppo", "grpo"])
def test_a_step_in_which_every_response_is_masked_changes_nothing(params: Any) -> None:
    run = trainer(params, mask_truncated=True)
    scored = run.score(run.sample())
    none = torch.zeros_like(scored.rollout.has_eos)
    scored = dataclasses.replace(scored, rollout=dataclasses.replace(scored.rollout, has_eos=none))
    experience, metrics = run.algorithm.compute_advantages(scored)
    step = run.updater.step(experience)
    assert step["policy_loss"] == step["grad_norm"] == 0
    assert all(map(math.isfinite, [*step.values(), *metrics.values()]))


def test_masked_responses_have_no_gradient_and_no_weight() -> None:
    """The step is that of the other responses alone, by mean over tokens."""
    run = trainer(GRPO_PARAMS, mask_truncated=True, loss_type="dapo")
    scored = run.score(run.sample())
    has_eos = scored.rollout.has_eos
    assert 0 < has_eos.sum() < len(has_eos)
    experience, _ = run.algorithm.compute_advantages(scored)
    run.updater.optimizer.zero_grad()
    run.updater._backward(experience, experience)
    masked = gradients(run)
    run.updater.optimizer.zero_grad()
    kept = experience.select(has_eos.nonzero().squeeze(1))
    run.updater._backward(kept, kept)
    for name, gradient in gradients(run).items():
        torch.testing.assert_close(masked[name], gradient, rtol=1e-3, atol=1e-7)


def test_kl_in_the_reward_of_grpo_is_subtracted_before_the_group_is_standardised() -> None:
    run = trainer(GRPO_PARAMS, kl_penalty="reward", kl_coef=2.0)
    run.train()
    experience, _ = experience_of(run)
    scored = run.score(run.sample())
    mask = scored.rollout.response_mask
    totals = scored.scores - 2.0 * (scored.kl.k1 * mask).sum(1)
    pairs = totals.reshape(-1, 2)
    gap = (pairs[:, 0] - pairs[:, 1]) / 2
    expected = gap / (gap.abs() * 2**0.5 + 1e-4)  # the unbiased deviation of two numbers is |a − b| / √2
    torch.testing.assert_close(experience.advantages[::2, 0], expected, rtol=1e-4, atol=1e-4)
    assert "kl_loss" not in run.history[0]


# -- dynamic sampling --------------------------------------------------------------------------------------------------


def even_first_token(prompts: list[str], responses: list[str]) -> list[float]:
    """Reward 0 or 1, so that half of the pairs are equal."""
    return [float(int((text.split() or ["1"])[0]) % 2 == 0) for text in responses]


def test_other_prompts_take_the_places_of_those_without_signal() -> None:
    run = trainer(GRPO_PARAMS, reward=even_first_token, missing_eos_penalty=0.0, resample_rounds=1)
    first = run.score(run.sample())
    places = groups_without_signal(first.scores, 2)
    assert 0 < len(places) < 6
    scored, metrics = run.resample(first)
    left = groups_without_signal(scored.scores, 2)
    assert metrics["no_signal_share"] == len(places) / 6
    assert metrics["no_signal_share_left"] == len(left) / 6
    assert metrics["resampled_prompts"] == min(len(places), 4), "four of ten prompts are not in the update"
    assert len(left) < len(places)
    before = first.rollout.prompt_texts
    for place in range(6):
        rows = slice(2 * place, 2 * place + 2)
        same = scored.rollout.prompt_texts[rows] == before[rows]
        assert same == (place not in places or place in left)
        if not same:
            assert scored.rollout.prompt_texts[2 * place] not in before
    # Every row is one whole response: its text, tokens, score and reward are of each other.
    assert scored.scores.tolist() == even_first_token([], scored.rollout.texts) == scored.reward.total.tolist()
    assert scored.reward.components["rule"].tolist() == scored.scores.tolist()
    for row, text in enumerate(scored.rollout.texts):
        ids = scored.rollout.responses[row][scored.rollout.response_mask[row]].tolist()
        assert [word for word in ids if word > 2] == [int(word) for word in text.split() if int(word) > 2]
        prompt = scored.rollout.prompts[row][scored.rollout.prompt_mask[row]].tolist()
        assert prompt == [int(word) for word in scored.rollout.prompt_texts[row].split()]
    fresh = run.policy.reference_logprobs(scored.rollout)
    mask = scored.rollout.response_mask
    torch.testing.assert_close(scored.reference_logprobs[mask], fresh[mask], rtol=1e-4, atol=1e-4)


def test_replaced_groups_are_padded_to_one_width() -> None:
    short, long = trainer(GRPO_PARAMS), trainer(GRPO_PARAMS, prompts_per_update=4)
    one, other = (run.score(run.sample()) for run in (short, long))
    cut = dataclasses.replace(
        one.rollout, **{name: getattr(one.rollout, name)[:, :3] for name in ("responses", "response_mask", "logprobs")}
    )
    one = dataclasses.replace(one, rollout=cut, reference_logprobs=one.reference_logprobs[:, :3])
    merged = replace_groups(one, other, 2, {1: 3})
    assert merged.scores.tolist() == [*one.scores[:2].tolist(), *other.scores[6:8].tolist(), *one.scores[4:].tolist()]
    mask = merged.rollout.response_mask
    assert mask.sum(1).tolist() == [
        *cut.response_mask[:2].sum(1).tolist(),
        *other.rollout.response_mask[6:8].sum(1).tolist(),
        *cut.response_mask[4:].sum(1).tolist(),
    ]
    assert not mask[0, 3:].any()


def test_a_run_with_dynamic_sampling_goes_on_from_its_checkpoint_bit_for_bit(tmp_path: Any) -> None:
    settings: dict[str, Any] = {"reward": even_first_token, "resample_rounds": 3, "missing_eos_penalty": 0.0}
    whole = trainer(GRPO_PARAMS, **settings)
    whole.train()
    assert sum(row["resampled_prompts"] for row in whole.history) > 3
    recorder = Recorder()
    broken = trainer(GRPO_PARAMS, checkpoints=tmp_path, recorder=recorder, **settings)

    def interrupt() -> None:
        if recorder.ended == [1, 2, 3]:
            raise KeyboardInterrupt

    recorder.then = interrupt
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = trainer(GRPO_PARAMS, checkpoints=tmp_path, **settings)
    resumed.train()
    assert resumed.history == whole.history
    assert_same_weights(resumed, weights(whole))


def test_without_a_group_or_a_round_nothing_is_drawn_again() -> None:
    run = trainer(GRPO_PARAMS, reward=low_tokens)
    scored = run.score(run.sample())
    assert run.resample(scored)[0] is scored
    assert run.resample(scored)[1].keys() == {"no_signal_share"}
    single = trainer(PARAMS, samples_per_prompt=1)
    assert single.resample(single.score(single.sample()))[1] == {}


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED: list[tuple[type, Any, dict[str, Any], str]] = [
    (GRPOParams, GRPO_PARAMS, {"loss_type": "cispo"}, "set clip_range to null, and clip_range_high"),
    (GRPOParams, GRPO_PARAMS, {"loss_type": "cispo", "clip_range": None}, "clip_range_high to the bound less 1"),
    (
        GRPOParams,
        GRPO_PARAMS,
        {"loss_type": "cispo", "clip_range": None, "clip_range_high": 4.0, "importance_level": "sequence"},
        "cispo needs importance_level: token",
    ),
    (GRPOParams, GRPO_PARAMS, {"clip_range": None, "clip_range_high": 0.3}, "set clip_range_high to null"),
    (PPOParams, PARAMS, {"clip_range": None, "clip_range_high": 0.3}, "set clip_range_high to null"),
    (PPOParams, PARAMS, {"dual_clip": 1.1}, "dual_clip above 1 \\+ clip_range_high"),
    (GRPOParams, GRPO_PARAMS, {"dual_clip": 3.0, "clip_range": None}, "set clip_range"),
    (PPOParams, PARAMS, {"samples_per_prompt": 1, "resample_rounds": 1}, "set samples_per_prompt above 1"),
    (GRPOParams, GRPO_PARAMS, {"overlong_buffer": 2, "missing_eos_penalty": 0.0}, "set missing_eos_penalty above 0"),
    (PPOParams, PARAMS, {"advantage": "return"}, "set value_coef to 0 and value_lam to null"),
    (PPOParams, PARAMS, LOO | {"value_lam": 1.0}, "set value_coef to 0 and value_lam to null"),
    (PPOParams, PARAMS, {"action": "response", "top_entropy_share": 0.2}, "action must be token"),
]


@pytest.mark.parametrize(("kind", "params", "changes", "problem"), REFUSED)
def test_settings_that_would_do_nothing_are_refused(kind: type, params: Any, changes: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        kind.model_validate(params.model_dump() | changes)
