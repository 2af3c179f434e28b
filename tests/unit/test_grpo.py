"""GRPO's curves under PPO's names, against figures worked by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tasks.grpo import ConversationSummary, MultiTurnRolloutFunction, _RewardFunction, _update_rows
from tasks.rewards.composition import CompositeReward
from tasks.rl.rollout import derive_generator
from tests.conftest import tiny_model
from tests.support.tiny_stages import _GRPO
from tests.unit.rl.test_multi_turn import ROWS, TOKENIZER, answer, conversations, multi_turn_sampler


def test_a_row_is_one_update_with_kl_from_its_first_step():
    steps = [
        {"loss": 1.0, "kl": 0.1, "entropy": 4.0, "grad_norm": 1.0, "learning_rate": 0.4, "clip_ratio/region_mean": 0.0},
        {"loss": 3.0, "kl": 9.0, "entropy": 2.0, "grad_norm": 3.0, "learning_rate": 0.2, "clip_ratio/region_mean": 0.5},
        {"loss": 5.0, "kl": 0.2, "entropy": 1.0, "grad_norm": 1.0, "learning_rate": 0.1, "clip_ratio/region_mean": 0.0},
        {"loss": 5.0, "kl": 0.3, "entropy": 1.0, "grad_norm": 1.0, "learning_rate": 0.1, "clip_ratio/region_mean": 0.0},
    ]
    rollouts = [
        {"reward": 0.5, "length": 20.0, "reward/a": 0.5, "reward/b": 1.0},
        {"reward": 0.7, "length": 10.0, "reward/a": 2.0, "reward/b": 0.5},
    ]
    first, second = _update_rows(steps, rollouts, 2, lambda update: {"a": 1.0, "b": 1.0})
    assert first["step"] == 1
    assert first["kl"] == pytest.approx(0.1 * 20)
    assert (first["loss"], first["entropy"], first["clip_fraction"]) == (2.0, 3.0, 0.25)
    assert second["kl"] == pytest.approx(0.2 * 10)
    assert (second["step"], second["reward"]) == (2, 0.7)
    assert first["hacking/length_drift"] == 1
    assert second["hacking/length_drift"] == 1, "another update has to confirm it"
    assert second["hacking/entropy_collapse"] == 3
    assert second["hacking/component_tradeoff"] == pytest.approx(0.5), "1.5 gained by a, 0.5 lost by b: 0.5 of 1"


class Noticing:
    def __call__(self, prompts, responses):
        raise AssertionError("a second pass")

    def measured(self, prompts, responses):
        return torch.tensor([1.0, 2.0, 3.0, 4.0]), {"ood_share": torch.tensor([0.0, 1.0, 1.0, 1.0])}


def test_what_the_reward_notices_is_in_the_row_and_watched():
    state = SimpleNamespace(global_step=0, log_history=[])
    score = _RewardFunction(CompositeReward({"a": Noticing()}, {"a": 1.0}), _GRPO, eos_token_id=1)
    assert score(["p"] * 4, list("wxyz"), completion_ids=[[5, 1]] * 4, trainer_state=state) == [1.0, 2.0, 3.0, 4.0]
    (entry,) = state.log_history
    assert entry["ood_share"] == 0.75
    rows = _update_rows([{"loss": 0.0}] * 2, [entry | {"ood_share": 0.25}, entry], 1, lambda update: {"a": 1.0})
    assert [row["hacking/ood_responses"] for row in rows] == [0.0, 0.5]


def test_a_conversation_is_scored_by_what_the_environment_paid_discounted_over_turns():
    """γ = 0.5: 1 after one turn, 1/2 after two; 0 − 0.1 where one of three turns was cut off, however late."""
    state = SimpleNamespace(global_step=0, log_history=[])
    reward = CompositeReward({}, {"environment": 1.0})
    score = _RewardFunction(
        reward, _GRPO.model_copy(update={"missing_eos_penalty": 0.1}), eos_token_id=1, turn_gamma=0.5
    )
    summaries = [
        ConversationSummary("a", " a\nUser: x", reward=1.0, turns=1, tokens=2, ended=True),
        ConversationSummary("b\nc", " b\nUser: y\nBot: c\nUser: x", reward=1.0, turns=2, tokens=4, ended=True),
        ConversationSummary("d\ne\nf", " d", reward=0.0, turns=3, tokens=6, ended=False),
        ConversationSummary("g", " g", reward=0.0, turns=1, tokens=2, ended=True),
    ]
    scores = score(
        ["p"] * 4, ["both sides"] * 4, completion_ids=[[5, 7, 7, 7, 1]] * 4, trainer_state=state, said=summaries
    )
    assert scores == pytest.approx([1.0, 0.5, -0.1, 0.0])
    (entry,) = state.log_history
    assert (entry["success"], entry["turns"], entry["length"]) == (0.5, 1.75, 3.5)
    assert (entry["reward/environment"], entry["truncated_share"]) == (0.5, 0.25)
    assert entry["samples"][0]["response"] == " a\nUser: x"


def test_the_loss_gets_the_mask_of_the_policys_tokens(monkeypatch):
    monkeypatch.setattr("tasks.rl.multi_turn.answered", answer)
    rollouts = MultiTurnRolloutFunction(_GRPO, multi_turn_sampler(), [row.prompt for row in ROWS], seed=3)
    prompts = [row.prompt for row in (ROWS[4], ROWS[1]) for _ in range(_GRPO.samples_per_prompt)]
    trainer = SimpleNamespace(model=tiny_model(), state=SimpleNamespace(global_step=2))
    given = rollouts(prompts, trainer)
    assert trainer.model.training, "TRL trains the model that it gets back"
    expected = conversations(
        chosen=(4, 1), samples=_GRPO.samples_per_prompt, generator=lambda turn: derive_generator(3, 2, turn)
    )
    for row, prompt in enumerate(prompts):
        length = int(expected.response_mask[row].nonzero().max()) + 1
        assert given["prompt_ids"][row] == TOKENIZER(prompt).input_ids
        assert given["completion_ids"][row] == expected.responses[row, :length].tolist()
        assert given["env_mask"][row] == expected.response_mask[row, :length].long().tolist()
        assert given["logprobs"][row] == expected.logprobs[row, :length].tolist()
        assert given["summaries"][row].transcript == expected.transcripts[row]
        assert given["summaries"][row].tokens == sum(given["env_mask"][row])
    assert {0, 1} <= {own for mask in given["env_mask"] for own in mask}
