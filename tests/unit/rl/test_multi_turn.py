"""Conversations token by token: whose they are, what they were sampled with, and what reads them afterwards."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tasks.config.rl import RLParams
from tasks.config.training import GenerationParams
from tasks.core.rows import Prompt
from tasks.rewards.composition import CompositeReward
from tasks.rl.callbacks import Checkpoint
from tasks.rl.environments import Step
from tasks.rl.multi_turn import MultiTurnRollout, MultiTurnSampler
from tasks.rl.policy import Policy, PolicyOutput, model_inputs
from tasks.rl.rollout import LocalSampler, derive_generator
from tasks.rl.trainer import RLTrainer
from tests.conftest import EOS, letter_tokenizer, tiny_model
from tests.support.tiny_trainer import (
    GRPO_PARAMS,
    PARAMS,
    algorithm_of,
    assert_same_weights,
    experience_of,
    gradients,
    moved_policy,
    weights,
)

SIGNS = "Ġabcdefghijklmnopqrstuvwxy:UĊB"
"""All that a role needs; Ċ is the line end."""

ROWS = [Prompt(id=letter, prompt=f"U: {letter}{letter}\nB:", answer=letter) for letter in "abcde"]
TOKENIZER = letter_tokenizer(SIGNS)


class Echo:
    """Repeats the turn's first letter; it is over, and paid, once that lies before n."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def reset(self, row: Prompt) -> str:
        return row.prompt

    def step(self, action: str) -> Step:
        self.heard.append(action)
        first = next((sign for sign in action if sign.isalpha() and sign.islower()), "y")
        return Step(first * len(self.heard), float(first < "n"), done=first < "n")


def answer(text: str) -> str:
    """As a conversation writes it; these letters have no more signs than this tokenizer."""
    return f"\nU: {text}\nB:"


@pytest.fixture(autouse=True)
def _short_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.rl.multi_turn.user_turn", answer)


def multi_turn_sampler(model: Any = None, *, temperature: float = 1.0, value_head: Any = None) -> MultiTurnSampler:
    generation = GenerationParams(max_new_tokens=3, temperature=temperature)
    return MultiTurnSampler(LocalSampler(model or tiny_model(), TOKENIZER, generation, value_head), Echo, max_turns=3)


def conversations(
    model: Any = None, chosen: Any = (0, 1, 2, 3, 4), samples: int = 2, seed: int = 0, **options: Any
) -> MultiTurnRollout:
    sampler, rows = multi_turn_sampler(model, **options), [ROWS[index] for index in chosen]
    return sampler.sample(rows, derive_generator(seed), samples_per_prompt=samples)


def pieces(rollout: MultiTurnRollout, row: int) -> list[tuple[bool, list[int]]]:
    """Runs of own and other tokens."""
    runs: list[tuple[bool, list[int]]] = []
    length = int(rollout.response_mask[row].nonzero().max()) + 1
    tokens, owns = rollout.responses[row, :length].tolist(), rollout.response_mask[row, :length].tolist()
    for token, own in zip(tokens, owns, strict=True):
        if not runs or runs[-1][0] != own:
            runs.append((own, []))
        runs[-1][1].append(token)
    return runs


def test_own_tokens_and_the_environments_take_turns_and_end_with_an_own_one() -> None:
    rollout = conversations()
    assert sorted(set(rollout.turns.tolist())) == [1, 2, 3], "the rows should end after different turns"
    for row in range(10):
        runs = pieces(rollout, row)
        turns = [ids for own, ids in runs if own]
        assert [own for own, _ in runs] == [place % 2 == 0 for place in range(2 * len(turns) - 1)]
        assert len(turns) == rollout.turns[row]
        environment = Echo()
        steps = [environment.step(TOKENIZER.decode(ids, skip_special_tokens=True)) for ids in turns]
        replies = [ids for own, ids in runs if not own]
        assert replies == [TOKENIZER(answer(step.observation)).input_ids for step in steps[:-1]]
        assert [step.done for step in steps[:-1]] == [False] * len(replies)
        assert steps[-1].done or len(turns) == 3
        assert rollout.rewards[row] == steps[-1].reward
        assert rollout.has_eos[row] == all(ids[-1] == EOS for ids in turns)
        assert all(len(ids) <= 3 and EOS not in ids[:-1] for ids in turns)


def test_what_stands_where_nobody_counts_is_nothing() -> None:
    rollout = conversations(value_head=nn.Linear(32, 1))
    assert rollout.logprobs[~rollout.response_mask].eq(0).all()
    assert rollout.values[~rollout.response_mask].eq(0).all()
    assert rollout.logprobs[rollout.response_mask].lt(0).all()
    assert rollout.response_mask.dtype is torch.bool


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_forward_pass_over_the_whole_conversation_gives_the_rollouts_log_probabilities(temperature: float) -> None:
    model = moved_policy()
    policy = Policy(model, temperature=temperature)
    nn.init.normal_(policy.value_head.weight)
    rollout = conversations(model, temperature=temperature, value_head=policy.value_head)
    mask = rollout.response_mask
    with torch.no_grad():
        whole, values, _ = policy(rollout)  # reads of an Experience what a rollout has, too
    assert (whole[mask] - rollout.logprobs[mask]).abs().max() <= 1e-4
    assert (values[mask] - rollout.values[mask]).abs().max() <= 1e-4
    for row in range(len(mask)):
        length = int(mask[row].nonzero().max()) + 1
        ids = torch.tensor([TOKENIZER(rollout.prompt_texts[row]).input_ids + rollout.responses[row, :length].tolist()])
        with torch.no_grad():
            logits = model(ids).logits[0, -length - 1 : -1] / temperature
        fresh = torch.log_softmax(logits, -1).gather(1, ids[0, -length:].unsqueeze(1)).squeeze(1)
        own = mask[row, :length]
        torch.testing.assert_close(rollout.logprobs[row, :length][own], fresh[own], rtol=1e-4, atol=1e-4)


def test_the_environments_tokens_are_read() -> None:
    rollout = conversations()
    lengths = [int(row.nonzero().max()) + 1 for row in rollout.response_mask]
    prompts = rollout.prompt_mask.sum(1).tolist()
    width = rollout.responses.shape[1]
    expected = [prompt + min(length, width - 1) for prompt, length in zip(prompts, lengths, strict=True)]
    assert model_inputs(rollout)["attention_mask"].sum(1).tolist() == expected


def test_a_conversation_does_not_depend_on_how_long_others_last() -> None:
    """Row 2 alone in its part of a batch that is as large as the whole is the row of the whole."""
    whole = conversations(samples=1)
    other = conversations(samples=1, chosen=(0, 1, 2, 3, 0))
    for row in range(4):
        assert whole.transcripts[row] == other.transcripts[row]
    assert conversations(samples=1, seed=1).transcripts != whole.transcripts


def test_people_read_both_sides_and_rewards_the_policys_words_alone() -> None:
    rollout = conversations()
    row = rollout.turns.tolist().index(2)
    turns = [TOKENIZER.decode(ids, skip_special_tokens=True) for own, ids in pieces(rollout, row) if own]
    environment = Echo()
    first, second = (environment.step(turn) for turn in turns)
    expected = turns[0] + answer(first.observation) + turns[1] + f"\nUser: {second.observation}"
    assert rollout.transcripts[row] == expected
    assert rollout.texts[row] == "\n".join(turn.strip() for turn in turns)
    assert rollout.prompt_texts[row] == ROWS[row // 2].prompt


def test_what_was_earned_is_a_component_and_turns_and_success_are_noticed() -> None:
    rollout = conversations()
    reward = CompositeReward({"short": lambda prompts, texts: [-1.0] * len(texts)}, {"environment": 2.0, "short": 0.5})
    outcome = reward(rollout.prompt_texts, rollout.texts, external=rollout.external_rewards)
    assert torch.equal(outcome.components["environment"], rollout.rewards)
    assert torch.equal(outcome.total, 2 * rollout.rewards - 0.5)
    assert torch.equal(outcome.metrics["success"], rollout.rewards)
    assert torch.equal(outcome.metrics["turns"], rollout.turns.float())


VARIANTS = {action: PARAMS.model_copy(update={"action": action}) for action in ("token", "turn", "response")}
VARIANTS["grpo"] = GRPO_PARAMS
EACH_VARIANT = pytest.mark.parametrize("params", VARIANTS.values(), ids=VARIANTS)


# -- in the trainer --------------------------------------------------------------------------------------------


def run_of(params: RLParams = PARAMS, **changes: Any) -> RLTrainer:
    params = params.model_copy(update={"prompts_per_update": 4, "micro_batch_size": 8} | changes)
    torch.manual_seed(0)
    model = moved_policy()
    policy = Policy(model, temperature=1.0, value_head=params.stage == "ppo")
    return RLTrainer(
        policy, multi_turn_sampler(model, value_head=policy.value_head), ROWS,
        CompositeReward({}, {"environment": 1.0}), algorithm_of(params, turn_gamma=0.5),
        seed=0, checkpoint=Checkpoint(None),
    )  # fmt: skip


@pytest.mark.parametrize("action", ["turn", "token", "response"])
def test_turns_are_discounted_by_the_environments_gamma_and_paid_at_the_end(action: str) -> None:
    """λ = 1 and no KL penalty: the return of turn k of n is γ^(n − 1 − k) · score, whatever the values.

    Where an action is no turn, the one return for the conversation is that of its beginning.
    """
    trainer = run_of(action=action, lam=1.0, kl_coef=0.0, kl_controller="fixed", missing_eos_penalty=0.0)
    scored = trainer.score(trainer.sample())
    rollout, outcome = scored.rollout, scored.reward
    experience, metrics = trainer.algorithm.compute_advantages(scored)[0], trainer._rollout_metrics(scored)
    assert set(rollout.turns.tolist()) > {1}
    for row, turns in enumerate(rollout.turns.tolist()):
        actions = {"turn": turns, "token": int(rollout.response_mask[row].sum()), "response": 1}[action]
        discounts = [0.5 ** (turns - 1 - (turn if action == "turn" else 0)) for turn in range(actions)]
        own = experience.returns[row][experience.action_mask[row]].tolist()
        assert own == pytest.approx([outcome.total[row].item() * discount for discount in discounts], abs=1e-6)
        assert action == "token" or experience.action_mask[row, :actions].all()
    assert metrics["turns"] == pytest.approx(rollout.turns.float().mean().item())
    assert metrics["success"] == metrics["reward/environment"] == pytest.approx(rollout.rewards.mean().item())
    assert metrics["length"] == pytest.approx(rollout.response_mask.sum(1).float().mean().item())


@pytest.mark.parametrize("params", [VARIANTS["token"], VARIANTS["response"], GRPO_PARAMS])
def test_a_cut_costs_as_much_in_a_late_turn_as_in_the_first(params: RLParams) -> None:
    trainer = run_of(params, lam=1.0, kl_coef=0.0, kl_controller="fixed", missing_eos_penalty=0.5)
    scored = trainer.score(trainer.sample())
    rollout, outcome = scored.rollout, scored.reward
    late = (rollout.turns > 1) & ~rollout.has_eos
    assert late.any(), "a sample that shows nothing"
    experience, _ = trainer.algorithm.compute_advantages(scored)
    expected = outcome.total * 0.5 ** (rollout.turns - 1) - 0.5 * (~rollout.has_eos).float()
    found = scored.scores if params is GRPO_PARAMS else experience.returns[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@EACH_VARIANT
def test_the_first_step_starts_at_the_rollouts_policy_and_micro_batches_do_not_change_its_gradient(
    params: RLParams,
) -> None:
    found = []
    for size in (8, 3):
        trainer = run_of(params, micro_batch_size=size)
        metrics = trainer.updater.step(experience_of(trainer)[0])
        assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-5)
        assert metrics["ratio_max"] == pytest.approx(1, abs=1e-4)
        found.append(gradients(trainer))
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole, rtol=1e-4, atol=1e-6)


@EACH_VARIANT
def test_no_gradient_comes_from_the_environments_tokens(params: RLParams, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens as targets: junk in their log-probabilities and values changes nothing, and none flows back."""
    seen: list[Tensor] = []
    found = []
    for junk in (None, 7.0, float("nan")):
        trainer = run_of(params)
        experience, _ = experience_of(trainer)
        mask = experience.response_mask
        forward = trainer.policy.forward

        def spoilt(piece: Any, forward: Any = forward, junk: Any = junk, **options: Any) -> PolicyOutput:
            output = forward(piece, **options)
            if junk is None:
                trained = [tensor for tensor in output if tensor.requires_grad]
                for tensor in trained:
                    tensor.retain_grad()
                seen.extend(trained)
                return output
            return PolicyOutput(*(tensor.masked_fill(~piece.response_mask, junk) for tensor in output))

        monkeypatch.setattr(trainer.policy, "forward", spoilt)
        found.append((trainer.updater.step(experience), gradients(trainer)))
    assert len(seen) == (1 if params is GRPO_PARAMS else 2), "log-probabilities, and values where there is a head"
    for tensor in seen:
        assert tensor.grad is not None
        assert tensor.grad[~mask].eq(0).all()
        assert tensor.grad[mask].ne(0).any()
    for metrics, spoiled in found[1:]:
        assert metrics == found[0][0]
        for name, plain in found[0][1].items():
            assert torch.equal(spoiled[name], plain)


@pytest.mark.parametrize("params", [VARIANTS["turn"], GRPO_PARAMS])
def test_two_runs_are_the_same_and_samples_hold_whole_conversations(params: RLParams) -> None:
    one, other = run_of(params, updates=2), run_of(params, updates=2)
    one.train()
    other.train()
    assert (one.history, one.samples) == (other.history, other.samples)
    assert_same_weights(one, weights(other))
    assert {"turns", "success", "reward/environment"} <= set(one.history[-1])
    assert all("\nUser: " in sample["response"] for sample in one.samples)
